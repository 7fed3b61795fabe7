"""Which engine the flags choose, and which flags go together."""

import sys

import pytest

from caption_train.adapters.record import resolve_base
from caption_train.captioning.engines.choose import make_engine
from caption_train.captioning.engines.endpoint import ServerEngine
from caption_train.captioning.engines.local import LocalEngine
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.system.processes import Processes


def choose(processes=None, **flags):
    family = get_family("blip")
    options = CaptionOptions(images=["photos"], device="cpu", **flags)
    base = resolve_base(family, "somebody/model", None, None, None)
    return make_engine(family, base, options, processes or Processes())


def test_the_flags_choose_the_engine():
    assert isinstance(choose(), LocalEngine)
    assert isinstance(choose(endpoint="http://localhost:1/v1", model="m"), ServerEngine)


def test_the_first_line_names_model_device_and_precision():
    assert choose(dtype="bfloat16").describe() == "somebody/model on cpu in bfloat16"


def test_every_process_of_several_asks_the_server():
    engine = choose(Processes(1, 2, 1), endpoint="http://localhost:1/v1", model="m")
    assert list(engine.caption([])) == []


def test_without_ray_its_engine_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--engine ray needs Ray .*: pip install ray, or"):
        choose(engine="ray")


def test_a_server_and_a_cluster_caption_shards_too():
    for flags in ({"endpoint": "http://localhost:1/v1", "model": "m"}, {"engine": "ray"}):
        assert CaptionOptions(images=["a.tar"], output_shards="out", **flags).check() == []


def test_ray_under_torchrun_is_refused():
    with pytest.raises(UsageError, match="leave torchrun out"):
        choose(Processes(0, 2, 0), engine="ray")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"actors": 2}, "--actors is of --engine ray"),
        ({"gpus_per_actor": 0.5}, "--gpus_per_actor is of --engine ray"),
        ({"engine": "ray", "cuda_graphs": True}, "--cuda_graphs does not go with --engine ray"),
        ({"engine": "ray", "actors": 0}, "--actors"),
        ({"engine": "ray", "gpus_per_actor": -1.0}, "--gpus_per_actor"),
    ],
)
def test_flags_that_do_not_go_together_are_named(flags, problem):
    (said,) = CaptionOptions(images=["photos"], **flags).check()
    assert said.startswith(problem)

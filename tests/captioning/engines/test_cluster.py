"""Captioning on a Ray cluster gives what captioning in one process gives. Needs `ray`.

Processes that import torch take most of the time: all tests that caption share one engine, in this order.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install ray")

import ray
from PIL import Image
from ray.cluster_utils import Cluster

from caption_train.adapters.record import resolve_base
from caption_train.captioning.engines.cluster import engine as cluster_engine
from caption_train.captioning.engines.cluster import pool
from caption_train.captioning.engines.cluster.engine import RayEngine
from caption_train.captioning.engines.cluster.nodes import CaptionActor
from caption_train.captioning.engines.local import LocalEngine
from caption_train.captioning.job import caption_folder
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.captioning.shards import job as shard_job
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.processes import join_processes
from tests.fixtures.shards import read_tar, write_parquet, write_tar

NOTICED_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 5_000,
    "health_check_failure_threshold": 2,
}


@pytest.fixture(scope="module")
def nodes():
    """Two nodes on this machine, with room for one actor each: (cluster, the second node)."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": NOTICED_SOON})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_ADDRESS", cluster.address)
        yield cluster, second
    cluster.shutdown()


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("blip")


@pytest.fixture(scope="module")
def engine(nodes, base):
    on_sigterm = signal.getsignal(signal.SIGTERM)
    engine = make_engine(base, RayEngine, actors=2)
    assert f"on Ray at {nodes[0].address} (2 actors)" in engine.describe()
    engine.open()
    assert signal.getsignal(signal.SIGTERM) is on_sigterm
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(60)]
    for number, path in enumerate(paths):
        Image.effect_noise((40 + number, 60), 200).convert("RGB").save(path)
    paths[2].write_bytes(b"damaged")
    return paths


def make_options(base, **changes):
    settings = {"device": "cpu", "beams": 1, "max_token_length": 6, "batch_size": 2, "num_workers": 0}
    return CaptionOptions(**{"images": ["unused"], "base_model": str(base)} | settings | changes)


def make_engine(base, kind, **changes):
    family = get_family("blip")
    known = resolve_base(family, str(base), None, None, None)
    return kind(family, known, make_options(base, **changes), join_processes())


def show(results):
    return [
        (result.image, result.size, result.generated) if isinstance(result, CaptionResult) else result
        for result in results
    ]


@pytest.fixture(scope="module")
def caption_here(base):
    engine = make_engine(base, LocalEngine)
    engine.open()
    return lambda images: show(engine.caption([Task(image, "") for image in images]))


def look_at_actors(engine):
    """Return the process of each actor, and which model it has loaded."""
    looks = [
        actor.handle.__ray_call__.remote(lambda self: (os.getpid(), id(self._loaded)))
        for actor in engine._pool._actors
    ]
    return ray.get(looks)


def test_what_a_cluster_cannot_do_is_one_line(nodes, base):
    with pytest.raises(UsageError, match="--gpus_per_actor 1: the cluster has 0 GPUs"):
        make_engine(base, RayEngine, gpus_per_actor=1.0).describe()
    with pytest.raises(UsageError, match="--actors 50"):
        make_engine(base, RayEngine, actors=50).describe()


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch, base):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        CaptionTrainError, match=r"--engine ray: the cluster at RAY_ADDRESS=127\.0\.0\.1:1: "
    ) as found:
        make_engine(base, RayEngine).describe()
    assert "\n" not in str(found.value)


class DiesInLoad(CaptionActor):
    """Is killed while it loads the model, as often as the file that counts its deaths has room."""

    deaths, most = Path(), 0

    def load(self):
        if len(self.deaths.read_text()) < self.most:
            with self.deaths.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)

    def caption(self, encoded):
        return [Unreadable(task.image, f"{task.image}: seen") for task in encoded]


@pytest.fixture
def dying(nodes, base, tmp_path, monkeypatch):
    """An engine of one actor that dies in `load` so many times, and the file that counts its deaths."""
    # Nodes cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(cluster_engine, "load_processor", lambda work: (None, []))
    monkeypatch.setattr(cluster_engine, "encode", lambda tasks, shared: tasks)
    engine = make_engine(base, RayEngine, actors=1)
    engine.describe()

    def prepare(most):
        deaths = tmp_path / "deaths"
        deaths.write_text("")
        kind = type("Dying", (DiesInLoad,), {"deaths": deaths, "most": most})
        monkeypatch.setattr(cluster_engine, "CaptionActor", kind)
        return engine, deaths

    yield prepare
    engine.close()


def test_an_actor_that_dies_once_while_it_loads_the_model_is_started_again(dying):
    engine, deaths = dying(1)
    assert engine.open() == []
    (seen,) = engine.stream([Task(Path("a.png"), "")])
    assert seen == Unreadable(Path("a.png"), "a.png: seen") and deaths.read_text() == "x"


def test_actors_that_die_each_time_they_load_the_model_end_the_run_in_one_line(dying, monkeypatch):
    # Each death takes seconds; that it is four of them is tested with a stand-in for Ray.
    monkeypatch.setattr(pool, "MOST_TRIES", 2)
    engine, deaths = dying(100)
    with pytest.raises(CaptionTrainError) as found:
        engine.open()
    said = str(found.value)
    assert said.startswith(
        "--engine ray: no actor is left: the last one died 2 times while it loaded the model"
    )
    assert "\n" not in said
    assert "use fewer --actors" in said and found.value.exit_code == 1
    assert deaths.read_text() == "xx"


def test_captions_and_names_are_those_of_one_process(engine, images, caption_here, monkeypatch):
    monkeypatch.chdir(images[0].parent)
    given = [Path(image.name) for image in images[:9]]
    assert show(engine.caption([Task(image, "") for image in given])) == caption_here(given)


def test_shards_of_all_kinds_get_the_bytes_that_one_process_writes(
    engine, base, images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    pictures = [(image.name, image.read_bytes()) for image in images[:7]]
    write_tar("in/0.tar", pictures[:3])
    write_tar("in/1.tar", pictures[3:])
    write_parquet("in/2.parquet", [{"image": content} for _, content in pictures])
    family = get_family("blip")
    places = ["in/0.tar", "in/1.tar", "in/2.parquet", f"file://{tmp_path}/in/0.tar"]
    for number, images_ in enumerate((places[:3], places[3:])):
        options = make_options(base, images=images_, output_shards=f"here{number}")
        assert caption_folder(options, family) == 1
        with monkeypatch.context() as patched:
            patched.setattr(shard_job, "make_engine", lambda *_: Lent(engine))
            options = make_options(base, images=images_, output_shards=f"ray{number}", engine="ray")
            assert options.check() == [] and caption_folder(options, family) == 1
        for path in Path(f"here{number}").glob("[0-9]*"):
            assert path.read_bytes() == Path(f"ray{number}", path.name).read_bytes()
    assert len(read_tar("ray0/1.tar")) == 8 and len(read_tar("ray1/0.tar")) == 5


class Lent:
    """An engine that a job opens and closes, and that lives on."""

    def __init__(self, engine):
        self.stream = engine.stream

    def describe(self):
        return "Ray"

    def open(self):
        return []

    def close(self):
        pass


def test_an_actor_that_is_killed_loses_nothing_and_the_other_goes_on_with_its_model(
    engine, images, caption_here, capsys
):
    before, found = look_at_actors(engine), []
    for result in engine.stream(Task(image, "") for image in images):
        found.append(result)
        if len(found) == 10:
            os.kill(before[0][0], signal.SIGKILL)
    assert show(found) == caption_here(images)
    assert "--engine ray: an actor died" in capsys.readouterr().err
    after = look_at_actors(engine)
    assert after[0][0] != before[0][0] and after[1] == before[1]


def test_a_node_that_dies_for_good_loses_nothing(engine, images, caption_here, nodes, capsys):
    cluster, second = nodes
    found = []
    for result in engine.stream(Task(image, "") for image in images):
        found.append(result)
        if len(found) == 10:
            cluster.remove_node(second, allow_graceful=False)
    assert show(found) == caption_here(images)
    assert "--engine ray: an actor died" in capsys.readouterr().err

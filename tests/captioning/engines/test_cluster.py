"""Captioning on a Ray cluster gives what captioning in one process gives. Needs `ray[data]`."""

from pathlib import Path

import pytest

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ray[data]'")

from PIL import Image
from ray.cluster_utils import Cluster

from caption_train.adapters.record import resolve_base
from caption_train.captioning.engines.cluster import RayEngine
from caption_train.captioning.generate import caption_images, make_generation
from caption_train.captioning.plan import CaptionResult
from caption_train.captioning.prompts import Task
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.processes import join_processes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def in_cluster(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return cluster


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(90)]
    for number, path in enumerate(paths):
        Image.effect_noise((40 + number, 60), 200).convert("RGB").save(path)
    paths[2].write_bytes(b"damaged")
    return paths


def make_work(base, **changes):
    family = get_family("blip")
    settings = {"device": "cpu", "beams": 1, "max_token_length": 6, "batch_size": 2, "actors": 1} | changes
    options = CaptionOptions(images=["unused"], base_model=str(base), **settings)
    return family, resolve_base(family, str(base), None, None, None), options


def make_engine(base, **changes):
    return RayEngine(*make_work(base, **changes), join_processes())


def show(results):
    return [
        (result.image, result.size, result.generated) if isinstance(result, CaptionResult) else result
        for result in results
    ]


def caption_here(base, images):
    family, base, options = make_work(base)
    model, processor = family.load(base.model_id)
    generation = make_generation(options, base.prompt)
    return show(caption_images(family, model.eval(), processor, images, generation, batch_size=2))


def test_captions_are_those_of_one_process_though_a_node_dies(in_cluster, tiny_base, images):
    second = in_cluster.add_node(num_cpus=2)
    in_cluster.wait_for_nodes()
    engine, found = make_engine(tiny_base("blip"), actors=2), []
    assert f"on Ray at {in_cluster.address} (2 actors)" in engine.describe()
    try:
        engine.open()
        for result in engine.caption([Task(image, "") for image in images]):
            found.append(result)
            if len(found) == 20:
                in_cluster.remove_node(second, allow_graceful=False)
    finally:
        engine.close()
    assert show(found) == caption_here(tiny_base("blip"), images)


def test_images_keep_the_names_that_the_run_gave_them(in_cluster, tiny_base, images, monkeypatch):
    monkeypatch.chdir(images[0].parent)
    given = [Path(image.name) for image in images[:4]]
    engine = make_engine(tiny_base("blip"))
    engine.describe()
    try:
        engine.open()
        found = list(engine.caption([Task(image, "") for image in given]))
    finally:
        engine.close()
    assert [result.image for result in found] == given
    assert show(found) == caption_here(tiny_base("blip"), given)


def test_what_a_cluster_cannot_do_is_one_line(in_cluster, tiny_base, tmp_path):
    with pytest.raises(UsageError, match="--gpus_per_actor 1: the cluster has 0 GPUs"):
        make_engine(tiny_base("blip"), gpus_per_actor=1.0).describe()
    with pytest.raises(UsageError, match="--actors 50"):
        make_engine(tiny_base("blip"), actors=50).describe()


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch, tiny_base):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        CaptionTrainError, match=r"--engine ray: the cluster at RAY_ADDRESS=127\.0\.0\.1:1: "
    ) as found:
        make_engine(tiny_base("blip")).describe()
    assert "\n" not in str(found.value)

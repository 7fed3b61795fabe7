"""A run on tars trains the bits of a run on the same files, and goes on from its checkpoints."""

import json
import shutil

import pytest

from tests.fixtures.runs import assert_same_run, make_options, train, write_pairs
from tests.fixtures.shards import write_parquet, write_tar

HARD = {"shuffle_captions": True, "caption_dropout": 0.2, "dropout": 0.1, "validation_split": 0.3}
HARD |= {"eval_every_n_epochs": 1, "epochs": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Ten pairs as files, as a tar and as a Parquet file."""
    folder = tmp_path_factory.mktemp("places")
    files = sorted(write_pairs(folder / "files", 10).iterdir())
    write_tar(folder / "files.tar", [(path.name, path.read_bytes()) for path in files])
    images = [path for path in files if path.suffix == ".png"]
    rows = [{"image": {"bytes": i.read_bytes()}, "text": i.with_suffix(".txt").read_text()} for i in images]
    write_parquet(folder / "files.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def on_files(base, places):
    train("blip", make_options("blip", base, places / "files", places / "out", **HARD))
    return places / "out"


@pytest.mark.parametrize("name", ["files.tar", "files.parquet"])
def test_a_run_on_shards_trains_the_bits_of_a_run_on_files(name, base, places, on_files, tmp_path):
    settings = HARD | ({"num_workers": 2} if name == "files.tar" else {})
    train("blip", make_options("blip", base, places / name, tmp_path / "out", **settings))
    assert_same_run(on_files, tmp_path / "out")
    records = [
        json.loads((out / "training.json").read_text())["dataset"] for out in (on_files, tmp_path / "out")
    ]
    # The rows of a Parquet file have no names.
    assert (records[0] == records[1]) == (name == "files.tar")


def test_a_run_on_files_goes_on_with_a_tar_of_them(base, places, tmp_path):
    settings = HARD | {"save_every_n_epochs": 1}
    train("blip", make_options("blip", base, places / "files", tmp_path / "1", **settings | {"epochs": 1}))
    shutil.copytree(tmp_path / "1", tmp_path / "2", symlinks=True)
    for name, out in (("files", "1"), ("files.tar", "2")):
        train("blip", make_options("blip", base, places / name, tmp_path / out, **settings, resume="auto"))
    assert_same_run(tmp_path / "1", tmp_path / "2")

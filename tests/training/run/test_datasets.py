"""Several dataset folders with weights: what an epoch reads, the split, the fingerprint, exact resume."""

import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

from caption_train.cli.arguments import parse_options
from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.training.run.data import read_training_data
from tests.fixtures.runs import make_options, read_log, train


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folders(tmp_path):
    """Two datasets in different places: `one` of 4 images, `far/two` of 3."""
    for place, count, green in (("one", 4, 0), ("far/two", 3, 99)):
        (tmp_path / place).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index * 40, green, 0)).save(tmp_path / place / f"{index}.png")
            (tmp_path / place / f"{index}.txt").write_text(f"{place} {index}")
    return [tmp_path / "one", tmp_path / "far/two"]


def read(folders, accelerator, **changes):
    first, *others = folders
    options = TrainOptions(dataset_dir=first, add_dataset=others, output_dir=first.parent / "out", **changes)
    assert options.check() == []
    return read_training_data(options, accelerator)


def names(pairs):
    return [pair.caption for pair in pairs]


def test_an_epoch_reads_each_dataset_as_often_as_it_weighs(folders, accelerator):
    data = read(folders, accelerator, dataset_weights=[1, 3])
    assert names(data.train)[:4] == [f"one {i}" for i in range(4)]
    assert names(data.train)[4:] == [f"far/two {i}" for i in range(3) for _ in range(3)]
    assert names(read(folders, accelerator).train) == list(dict.fromkeys(names(data.train)))


def test_what_is_held_out_is_the_same_whatever_the_weights(folders, accelerator):
    plain = read(folders, accelerator, validation_split=0.3)
    weighed = read(folders, accelerator, validation_split=0.3, dataset_weights=[5, 2])
    assert names(plain.validation) == names(weighed.validation) and len(plain.validation) == 2
    assert set(names(weighed.train)).isdisjoint(names(weighed.validation))


def test_a_copy_in_another_dataset_is_on_the_same_side_of_the_split(folders, accelerator):
    for index in range(3):
        shutil.copy(folders[0] / f"{index}.png", folders[1] / f"{index}.png")
    for seed in range(8):
        data = read(folders, accelerator, validation_split=0.4, seed=seed)
        sides = [{data.digests[pair.image] for pair in pairs} for pairs in (data.train, data.validation)]
        assert sides[0].isdisjoint(sides[1])


def test_the_fingerprint_is_that_of_contents_and_weights_not_of_places(folders, accelerator, tmp_path):
    described = read(folders, accelerator, dataset_weights=[1, 2]).describe()
    shutil.copytree(folders[0], tmp_path / "else/where")
    moved = [tmp_path / "else/where", folders[1]]
    assert read(moved, accelerator, dataset_weights=[1, 2]).describe() == described
    for changed in (
        read(folders, accelerator, dataset_weights=[2, 1]),
        read(folders, accelerator),
        read(folders[::-1], accelerator, dataset_weights=[2, 1]),
    ):
        assert changed.describe()["fingerprint"] != described["fingerprint"]


def test_one_dataset_is_described_as_ever(folders, accelerator):
    alone = read(folders[:1], accelerator).describe()
    assert (
        alone["fingerprint"] == read(folders[:1], accelerator, dataset_weights=[1]).describe()["fingerprint"]
    )
    assert alone["order"] == "197274fa619b92e5"


def test_problems_name_their_dataset(folders, accelerator):
    (folders[1] / "1.txt").write_bytes(b"a\0b")
    with pytest.raises(CaptionTrainError, match=r"far/two: 1\.txt"):
        read(folders, accelerator)


def test_dataset_dir_given_again_adds_one():
    def parse(*argv):
        return parse_options(TrainOptions, argv, prog="x", positionals=("dataset_dir", "output_dir"))

    given = "--dataset_dir a --dataset_dir b --output_dir o --dataset_dir c --dataset_weights 1 2 3"
    options = parse(*given.split())
    assert [(str(folder), weight) for folder, weight in options.datasets] == [("a", 1), ("b", 2), ("c", 3)]
    assert str(options.output_dir) == "o"
    alone = parse("a", "o")
    assert [(str(folder), weight) for folder, weight in alone.datasets] == [("a", 1)]
    for argv, message in (
        ("--dataset_dir a --dataset_dir b --output_dir o --dataset_weights 2", "1 weights, but there are 2"),
        ("--dataset_dir a --dataset_dir b --output_dir o --dataset_weights 0 1", "whole numbers from 1"),
        ("--dataset_dir a --dataset_dir a --output_dir o", "is given twice"),
    ):
        with pytest.raises(UsageError, match=message):
            parse(*argv.split())


def test_a_config_file_lists_datasets_and_the_command_line_replaces_all_of_them(tmp_path):
    config = tmp_path / "c.yaml"
    for text in ("dataset_dir: [a, b]", "dataset_dir: a\nadd_dataset: [b]"):
        config.write_text(f"{text}\noutput_dir: o\n")

        def parse(*argv, config=config):
            return parse_options(TrainOptions, ["--config", str(config), *argv], prog="x").datasets

        assert parse() == [(Path("a"), 1), (Path("b"), 1)]
        assert parse("--dataset_dir", "c") == [(Path("c"), 1)]
        assert parse("--dataset_dir", "c", "--dataset_dir", "d") == [(Path("c"), 1), (Path("d"), 1)]
    config.write_text("dataset_dir: []\noutput_dir: o\n")
    with pytest.raises(UsageError, match="dataset_dir"):
        parse()


@pytest.mark.parametrize("again", ["a/../a", "./a", "link"])
def test_the_same_dataset_by_another_path_is_given_twice(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("link").symlink_to("a")
    with pytest.raises(UsageError, match="is given twice"):
        parse_options(
            TrainOptions, ["--dataset_dir", "a", "--dataset_dir", again, "--output_dir", "o"], prog="x"
        )


def test_a_run_over_two_datasets_goes_on_exactly(tiny_base, folders, tmp_path):
    def run(name, **changes):
        options = {"add_dataset": folders[1:], "dataset_weights": [1, 2], "save_every_n_epochs": 1, **changes}
        return train("blip", make_options("blip", tiny_base("blip"), folders[0], tmp_path / name, **options))

    run("whole", epochs=2)
    checkpoint = next((tmp_path / "whole").glob("epoch-0001*"))
    run("again", epochs=2, resume=str(checkpoint))
    losses = {row["step"]: row["loss"] for row in read_log(tmp_path / "whole") if "loss" in row}
    again = {row["step"]: row["loss"] for row in read_log(tmp_path / "again") if "loss" in row}
    assert len(losses) == 10 and again.keys() >= {6, 7, 8, 9, 10}
    assert again.items() <= losses.items()
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]
    with pytest.raises(UsageError, match="dataset's fingerprint was"):
        run("other", epochs=2, resume=str(checkpoint), dataset_weights=[2, 1])

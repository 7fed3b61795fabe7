"""What a run reads, what it refuses, and what it leaves out."""

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image

from caption_train.config.training import TrainOptions
from caption_train.data import image_index
from caption_train.data.images import inspect_image
from caption_train.data.pairs import Pair
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.training.run import data as run_data
from caption_train.training.run import reading
from caption_train.training.run.data import TrainingData, read_training_data


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        Image.new("RGB", (8, 8), (index * 40, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    return tmp_path


def read(folder, accelerator, **changes):
    return read_training_data(TrainOptions(dataset_dir=folder, output_dir=folder, **changes), accelerator)


def spoil(folder) -> None:
    """Truncate one image, empty another, and put NUL characters into a caption."""
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.txt").write_bytes(b"a\0b")


def test_everything_unusable_is_listed_before_training_starts(folder, accelerator):
    spoil(folder)
    with pytest.raises(CaptionTrainError) as error:
        read(folder, accelerator)
    message = str(error.value)
    assert "3 bad rows or files" in message and "--on_bad_data skip" in message
    assert all(name in message for name in ("1.png", "2.png", "3.txt"))


def test_what_is_unusable_is_left_out_on_request_and_named(folder, accelerator, capsys):
    spoil(folder)
    data = read(folder, accelerator, on_bad_data="skip")
    assert [pair.image.name for pair in data.train] == ["0.png", "4.png", "5.png"]
    assert len(data.skipped) == 3
    assert "1.png" in capsys.readouterr().err


def test_copies_of_one_image_cannot_be_split(folder, accelerator):
    for index in range(1, 6):
        (folder / f"{index}.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(UsageError, match=r"--validation_split 0\.3: all images are copies"):
        read(folder, accelerator, validation_split=0.3)


def test_a_dataset_with_nothing_left_is_refused(folder, accelerator):
    for image in folder.glob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(UsageError, match="no pair is left to train on"):
        read(folder, accelerator, on_bad_data="skip")


def test_identical_images_are_never_split_between_training_and_validation(folder, accelerator):
    for index in range(6):
        (folder / f"copy {index}.png").write_bytes((folder / f"{index}.png").read_bytes())
        (folder / f"copy {index}.txt").write_text("the same again")
    data = read(folder, accelerator, validation_split=0.34)
    train, validation = ({p.image.read_bytes() for p in pairs} for pairs in (data.train, data.validation))
    assert len(data.validation) == 4 and train.isdisjoint(validation)


def test_a_relative_dataset_goes_with_an_absolute_validation_folder(folder, accelerator, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "held").mkdir()
    for suffix in ("png", "txt"):
        (folder / f"5.{suffix}").rename(folder / f"held/5.{suffix}")
    data = read(Path(folder.name), accelerator, validation_dir=folder / "held")
    mixed = TrainingData([*data.train, *data.validation], digests=data.digests)
    assert mixed.describe()["pairs"] == len(data.train) + 1
    assert data.describe()["held-out pairs"] == 1


def test_captions_that_will_be_cut_are_counted_and_the_longest_is_named(folder, accelerator, tiny_base):
    family = get_family("blip")
    tokenize = partial(family.tokenize_caption, family.load(str(tiny_base("blip")))[1])
    (folder / "1.txt").write_text("red circle, " * 10)
    (folder / "4.txt").write_text("red circle, " * 20)
    data = read(folder, accelerator)
    line = data.describe_cut(tokenize, 16)
    assert "--max_length 16: 2 captions" in line and "61 tokens in 4.txt" in line
    assert data.describe_cut(tokenize, 61) is None


def test_rows_that_the_metadata_holds_out_are_validated_on(folder, accelerator):
    rows = [{"file_name": f"{i}.png", "text": "a"} for i in range(6)]
    rows[0]["split"], rows[1]["split"] = "validation", "test"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = read(folder, accelerator)
    assert [pair.image.name for pair in data.validation] == ["0.png"]
    assert len(data.train) == 4
    with pytest.raises(UsageError, match="already"):
        read(folder, accelerator, validation_split=0.5)


def test_the_description_changes_with_order_and_captions_but_not_with_the_place(
    folder, accelerator, tmp_path
):
    described = read(folder, accelerator).describe()
    moved = folder.rename(tmp_path.with_name(tmp_path.name + " moved"))
    assert read(moved, accelerator).describe() == described
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(6)]
    (moved / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(moved, accelerator).describe() == described
    (moved / "metadata.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    assert read(moved, accelerator).describe()["order"] != described["order"]
    (moved / "metadata.jsonl").unlink()
    picture = (moved / "0.png").read_bytes()
    Image.new("RGB", (8, 8), (1, 0, 0)).save(moved / "0.png")
    assert read(moved, accelerator).describe()["fingerprint"] != described["fingerprint"]
    (moved / "0.png").write_bytes(picture)
    (moved / "0.txt").write_text("another")
    assert read(moved, accelerator).describe()["fingerprint"] != described["fingerprint"]


def test_a_second_run_decodes_nothing_and_knows_the_same_data(folder, accelerator, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(image_index, "_RACY_NS", -(10**15))
    first = read(folder, accelerator, validation_split=0.5)
    monkeypatch.setattr(image_index, "inspect_image", lambda path: pytest.fail(f"{path} is decoded"))
    second = read(folder, accelerator, validation_split=0.5)
    assert second == first and second.describe() == first.describe()
    assert len(second.digests) == len(second.pixels) == 6


@pytest.mark.parametrize("there", [True, False])
def test_no_garbage_is_looked_for_while_pairs_are_read_and_it_is_again_afterwards(
    there, folder, accelerator, monkeypatch
):
    seen, inspect_dataset = [], reading.inspect_any_table

    def note(*args, **settings):
        seen.append(gc.isenabled())
        return inspect_dataset(*args, **settings)

    monkeypatch.setattr(reading, "inspect_any_table", note)
    if there:
        read(folder, accelerator)
    else:
        with pytest.raises(UsageError, match="no such folder"):
            read(folder / "missing", accelerator)
    assert seen == [False] and gc.isenabled()


@pytest.mark.parametrize("known", [("012", "345"), ("012345", ""), ("", "")])
def test_processes_whose_indexes_know_other_images_share_them_out_alike(folder, monkeypatch, known):
    images = [folder / f"{index}.png" for index in range(6)]
    truth = {image: inspect_image(image) for image in images}
    both, given, local = threading.Barrier(2, timeout=60), [None, None], threading.local()

    def gather(rows):
        given[local.rank] = rows
        both.wait()
        found = given[0] + given[1]
        both.wait()
        return found

    def inspect(rank):
        local.rank = rank
        here = {image: truth[image] for image in images if image.stem in known[rank]}
        digests, pixels = ({image: found[part] for image, found in here.items()} for part in (0, 1))
        data = TrainingData([Pair(image, "x", "x") for image in images], (), (), digests, pixels)
        accelerator = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=False)
        run_data._inspect_images(data, accelerator)
        return data.digests, data.pixels

    monkeypatch.setattr(run_data, "gather_object", gather)
    with ThreadPoolExecutor(2) as ranks:
        for digests, pixels in ranks.map(inspect, (0, 1)):
            assert {image: (digests[image], pixels[image]) for image in images} == truth

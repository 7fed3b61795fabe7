"""A run too large for memory, made small: chunks of a few captions, tables of a few entries."""

import gc
import json
import os
import shutil
import signal
import tracemalloc

import pytest
from PIL import Image

from caption_train.captioning import job
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.job import caption_folder
from caption_train.captioning.storage import blocks, image_list, mapping
from caption_train.config.captioning import CaptionOptions
from caption_train.families.base import Generated
from tests.fixtures.browser import until
from tests.fixtures.fake_family import FakeFamily

COUNT = 23


@pytest.fixture
def folder(tmp_path):
    """Images 0.png … 22.png, every fifth in a folder inside."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number in range(COUNT):
        path = folder / ("sub" if number % 5 == 0 else "") / f"{number}.png"
        Image.new("RGB", (8, 6), (number * 11,) * 3).save(path)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """Make every limit so small that a few images are beyond it."""

    def set_limits():
        monkeypatch.setattr(job, "CHUNK", 4)
        monkeypatch.setattr(image_list, "BLOCK", 3)
        monkeypatch.setattr(mapping, "MOST_IN_MEMORY", 2)
        monkeypatch.setattr(blocks, "MOST_SORTED", 3)
        monkeypatch.setattr(blocks, "IN_MEMORY", 32)

    return set_limits


def run(images, family=None, **options):
    settings = {"images": [str(images)], "recursive": True, "num_workers": 0, "batch_size": 2} | options
    return caption_folder(CaptionOptions(**settings), family or FakeFamily())


def read_all(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def prepare(folder):
    """Leave what earlier runs and people leave: captions in files and rows, a link twice, a damaged image."""
    (folder / "3.txt").write_text("by hand\n")
    (folder / "19.png.txt").write_text("full name\n")
    (folder / "8.jpg").write_bytes((folder / "8.png").read_bytes())
    (folder / "7.png").write_bytes(b"no image")
    rows = [{"file_name": "sub/5.png", "text": "row", "n": 1}, {"file_name": "other", "text": "x"}]
    rows += [{"file_name": "21.png", "prompt": "ask", "text": None}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "captions.csv").write_text("file_name,n\r\n21.png,1\r\nother,2,3\r\n")


@pytest.mark.parametrize(
    "options",
    [
        {"output": "captions.jsonl", "save_captions": True},
        {"output": "captions.csv"},
        {"output": "captions.jsonl", "save_captions": True, "existing": "overwrite"},
        {"output": "captions.jsonl", "save_captions": True, "existing": "append"},
        {"output": "captions.csv", "prompts": ["text=a {caption}", "long=b"], "save_captions": True},
        {"output": "captions.jsonl", "limit": 9},
        {},
    ],
)
def test_chunks_write_and_say_what_one_run_does(folder, tmp_path, tiny, capsys, options):
    prepare(folder)
    seen = []
    for name in ("one", "many"):
        copy = (
            folder.rename(tmp_path / "copy") if name == "many" else shutil.copytree(folder, tmp_path / "copy")
        )
        if name == "many":
            tiny()
        family = FakeFamily()
        given = options | ({"output": copy / options["output"]} if "output" in options else {})
        code = run(copy, family, **given)
        out, err = capsys.readouterr()
        lines = [line.partition(" in ")[0] + line.partition("images/s)")[2] for line in err.splitlines()]
        lines = [line for line in lines if not line.startswith("Captioning ")]
        seen.append((code, out, sorted(lines), family.model.batches, read_all(copy)))
        shutil.rmtree(copy)
    assert seen[0] == seen[1]
    assert "Captioning up to" in err or options.get("limit")


def test_a_run_killed_in_a_later_chunk_goes_on_to_the_same_bytes(folder, tmp_path, tiny):
    whole = shutil.copytree(folder, tmp_path / "whole")
    run(whole, output=whole / "captions.jsonl", save_captions=True)
    tiny()

    class Dying(FakeFamily):
        def generate(self, *arguments, **settings):
            if len(self.model.batches) == 5:
                # The captions before are on their way to the disk, which a kill may come before.
                until(lambda: len(list(folder.rglob("*.txt"))) == 10)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().generate(*arguments, **settings)

    options = {"output": folder / "captions.jsonl", "save_captions": True}
    child = os.fork()
    if not child:
        run(folder, Dying(), **options)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    family = FakeFamily()
    assert run(folder, family, **options) == 0
    assert sum(family.model.batches) == COUNT - 10
    assert read_all(folder) == read_all(whole)


def test_an_interrupt_in_a_later_chunk_keeps_what_was_finished(folder, tiny, capsys):
    tiny()
    assert run(folder, FakeFamily(KeyboardInterrupt()), output=folder / "captions.jsonl") == 130
    assert f"Interrupted: 4 of up to {COUNT} captions are written" in capsys.readouterr().err
    assert len((folder / "captions.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("existing", ["keep", "overwrite", "append"])
def test_what_a_person_writes_before_their_chunk_comes_stays(folder, tiny, existing, capsys):
    tiny()
    theirs = folder / "22.txt"
    if existing != "keep":
        theirs.write_text("old")

    class Typing(FakeFamily):
        def generate(self, *arguments, **settings):
            if not self.model.batches:
                theirs.write_text("by hand\n")
            return super().generate(*arguments, **settings)

    assert run(folder, Typing(), save_captions=True, existing=existing) == 0
    assert theirs.read_text() == "by hand\n"
    err = capsys.readouterr().err
    said = "1 kept as they were" if existing == "keep" else "1 image got a caption from somebody else"
    assert said in err and f"{COUNT - 1} images captioned" in err


def test_an_image_of_a_later_chunk_that_can_get_no_caption_is_named_and_the_rest_captioned(
    folder, tiny, capsys
):
    tiny()
    (folder / "22.txt").symlink_to("nowhere")
    assert run(folder, save_captions=True) == 1
    err = capsys.readouterr().err
    assert f"{COUNT - 1} images captioned" in err and "1 image could not be read" in err
    assert "22.txt is a link to nothing" in err and "kept" not in err


def test_a_batch_that_does_not_fit_is_halved_once_for_all_chunks(folder, tiny, capsys):
    class Narrow(FakeFamily):
        def generate(self, model, processor, batch, **settings):
            if len(batch["pixel_values"]) > 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().generate(model, processor, batch, **settings)

    tiny()
    assert run(folder, Narrow(), output=folder / "captions.jsonl") == 0
    assert capsys.readouterr().err.count("going on with 1") == 1


def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    """Twice the images, the same Python memory: planned, written, merged, SQLite's own left out."""
    monkeypatch.setattr(job, "CHUNK", 32)
    monkeypatch.setattr(image_list, "BLOCK", 32)
    monkeypatch.setattr(mapping, "MOST_IN_MEMORY", 32)
    monkeypatch.setattr(blocks, "MOST_SORTED", 128)
    monkeypatch.setattr(job, "make_engine", Repeats)
    peaks = []
    for count in (50, 100, 600):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.png").touch()
        gc.collect()
        tracemalloc.start()
        for more in ({}, {"existing": "overwrite"}):
            assert run(folder, output=tmp_path / f"{count}.jsonl", **more) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len((tmp_path / f"{count}.jsonl").read_text().splitlines()) == count
    # The first run pays for what is imported. 500 paths more would be 250 kB.
    assert peaks[2] - peaks[1] < 70_000, peaks


class Repeats(Engine):
    """Captions each image with its name."""

    def describe(self):
        return "nothing"

    def stream(self, tasks):
        for task in tasks:
            yield job.CaptionResult(task.image, (1, 1), Generated(f"of {task.image.name}", [1], True))

"""Captions written beside the model's work: in order, counted when they are on the disk, errors not lost."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from caption_train.captioning.outputs import Caption
from caption_train.captioning.sinks.writer import CaptionWriter
from caption_train.errors import CaptionTrainError


class Disk:
    """Keeps captions; waits before each until it is `free`, and is full from the caption `full` on."""

    def __init__(self, full=None):
        self.written, self.full, self.free = [], full, threading.Event()

    def write(self, caption, key):
        assert self.free.wait(30)
        if self.full is not None and len(self.written) >= self.full:
            raise CaptionTrainError("no space")
        self.written.append((caption.text, key))
        return caption.text != "theirs"


def interrupt(*arguments):
    raise KeyboardInterrupt


def put(writer, *texts):
    for place, text in enumerate(texts):
        writer.put(Caption(Path("a.png"), text), "key", place)


def test_a_caption_is_finished_when_it_is_written_and_not_before():
    disk, noted = Disk(), []
    writer = CaptionWriter(disk, noted.append)
    put(writer, "one", "theirs", "three")
    assert list(writer.finished()) == []
    disk.free.set()
    found = [(w.caption.text, w.key, w.place, w.is_ours) for w in writer.finished(wait=True)]
    assert found == [("one", "key", 0, True), ("theirs", "key", 1, False), ("three", "key", 2, True)]
    assert disk.written == [("one", "key"), ("theirs", "key"), ("three", "key")]
    assert list(writer.finished(wait=True)) == [] and len(noted) == 3
    writer.close()


@pytest.mark.parametrize("where", ["finished", "put"])
def test_ctrl_c_at_any_point_loses_no_caption_and_counts_none_twice(where):
    disk, noted = Disk(), []
    disk.free.set()
    writer = CaptionWriter(disk, noted.append)
    put(writer, "one")
    with pytest.raises(KeyboardInterrupt):
        if where == "finished":
            for _ in writer.finished(wait=True):
                raise KeyboardInterrupt
        else:
            waiting = writer._waiting
            writer._waiting = SimpleNamespace(append=interrupt)
            try:
                put(writer, "two")
            finally:
                writer._waiting = waiting
    assert [written.caption.text for written in writer.finished(wait=True)] == ["one"]
    assert [written.caption.text for written in noted] == [text for text, _ in disk.written]
    assert len(noted) == (1 if where == "finished" else 2)
    writer.close()


def test_captions_do_not_pile_up_where_the_disk_is_slow():
    disk = Disk()
    writer = CaptionWriter(disk, lambda written: None, most=2)
    put(writer, "one", "two", "three")
    threading.Timer(0.05, disk.free.set).start()
    assert next(writer.finished()).caption.text == "one"
    writer.close()


def test_after_a_caption_that_cannot_be_written_no_other_is():
    disk = Disk(full=1)
    disk.free.set()
    writer = CaptionWriter(disk, lambda written: None)
    put(writer, "one", "two")
    for _ in range(2):
        with pytest.raises(CaptionTrainError, match="no space"):
            list(writer.finished(wait=True))
    disk.full = None
    put(writer, "three")
    writer.close()
    assert disk.written == [("one", "key")]

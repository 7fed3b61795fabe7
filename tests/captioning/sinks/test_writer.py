"""Captions written beside the model's work: in order, counted when they are on the disk, errors not lost."""

import threading
from pathlib import Path

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


def put(writer, *texts):
    for place, text in enumerate(texts):
        writer.put(Caption(Path("a.png"), text), "key", place)


def test_a_caption_is_finished_when_it_is_written_and_not_before():
    disk = Disk()
    writer = CaptionWriter(disk)
    put(writer, "one", "theirs", "three")
    assert list(writer.finished()) == []
    disk.free.set()
    found = [(w.caption.text, w.key, w.place, w.is_ours) for w in writer.finished(wait=True)]
    assert found == [("one", "key", 0, True), ("theirs", "key", 1, False), ("three", "key", 2, True)]
    assert disk.written == [("one", "key"), ("theirs", "key"), ("three", "key")]
    assert list(writer.finished(wait=True)) == []
    writer.close()


def test_captions_do_not_pile_up_where_the_disk_is_slow():
    disk = Disk()
    writer = CaptionWriter(disk, most=2)
    put(writer, "one", "two", "three")
    threading.Timer(0.05, disk.free.set).start()
    assert next(writer.finished()).caption.text == "one"
    writer.close()


def test_after_a_caption_that_cannot_be_written_no_other_is():
    disk = Disk(full=1)
    disk.free.set()
    writer = CaptionWriter(disk)
    put(writer, "one", "two")
    for _ in range(2):
        with pytest.raises(CaptionTrainError, match="no space"):
            list(writer.finished(wait=True))
    disk.full = None
    put(writer, "three")
    writer.close()
    assert disk.written == [("one", "key")]

"""Reads a run's pairs and decodes its images in processes of its own while torch is being imported, on Linux.

No torch here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from caption_train.config.training import TrainOptions
from caption_train.data.columns.parts import Part, PartFound
from caption_train.data.image_index import ImageIndex, index_path
from caption_train.data.images import ImageError
from caption_train.system.console import ProgressBar
from caption_train.system.processes import is_one_of_several
from caption_train.system.workers import count_cores
from caption_train.training.run.forked import Forked
from caption_train.training.run.reading import Found, read_pairs, read_part
from caption_train.training.run.unknown import Unknown

_SECONDS = 0.2
"""Of work in a task."""
_MOST_IMAGES = 1000
"""In a task."""
_REPORT_SECONDS = 0.1


class Ahead:
    """A process that reads a run's datasets, and decodes images that no run knows yet, with others' help.

    What goes wrong in it is found again by who asks, so it says nothing of its own.
    """

    def __init__(self, options: TrainOptions) -> None:
        # A fork: what is imported by now need not be imported again. It ends with this process.
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_work, args=(options, there, self._here), daemon=True)
        self._process.start()
        there.close()

    def take(self, *, show_progress: bool = True) -> Found | None:
        """Wait for what was read, and draw a bar while images are decoded; None if the process failed."""
        found = None
        with suppress(OSError):  # It has ended, and what it found is in the pipe.
            self._here.send("tell")
        try:
            with suppress(OSError, EOFError):
                found = self._receive(show_progress)
        finally:
            self._here.close()
            self._process.join(timeout=5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        return found

    def _receive(self, show_progress: bool) -> Found:
        bar = None
        try:
            while isinstance(word := self._here.recv(), tuple):
                done, total = word
                if bar is None:
                    bar = ProgressBar(total, "checking images", "image", shown=show_progress, leave=False)
                bar.update(count=done - bar.done)
        finally:
            if bar is not None:
                bar.close()
        # Columns come as they are: pickled with all else they would be in memory several times.
        buffers = [bytearray(size) for size in word["buffers"]]
        for buffer in filter(len, buffers):
            self._here.recv_bytes_into(buffer)
        return pickle.loads(word["found"], buffers=buffers)


def read_ahead(options: TrainOptions) -> Ahead | None:
    """Begin to read a run's datasets; None where a process of its own is of no use or not safe."""
    is_alone = threading.active_count() == 1 and "torch" not in sys.modules and not is_one_of_several()
    if sys.platform != "linux" or not is_alone:
        return None
    try:
        return Ahead(options)
    except OSError:
        return None


def _work(options: TrainOptions, there: Connection, here: Connection) -> None:
    """Read, decode, and send what was found."""
    here.close()
    gc.disable()
    # After Ctrl-C the run itself ends, and this process with it; its pipe is closed then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(Exception):
        teller = _Teller(there)
        with Forked(count_cores(), there, teller.listen) as forked, ImageIndex(index_path()) as index:
            found = read_pairs(options, lambda parts: _read_parts(parts, forked, index))
            with suppress(OSError, EOFError):
                _decode(Unknown.among(found.train, found.validation), forked, index, teller)
        _send(found, there)


def _send(found: Found, there: Connection) -> None:
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(found, 5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    there.send({"found": content, "buffers": [view.nbytes for view in views]})
    for view in views:
        if view.nbytes:
            there.send_bytes(view)


def _read_parts(parts: Iterable[Part], forked: Forked, index: ImageIndex) -> list[PartFound]:
    found: dict[int, PartFound] = {}

    def take(number: int, answer: tuple[PartFound, list[bytes]]) -> None:
        found[number], used = answer
        index.note_used(used)

    forked.run(_read_and_find, parts, take)
    return [found[number] for number in range(len(found))]


def _read_and_find(part: Part) -> tuple[PartFound, list[bytes]]:
    """Read a part in a process of its own; return also what the index should note as used."""
    index = _index(os.getpid())
    return read_part(part, index), index.take_used()


class _Teller:
    """Tells the run how many images were decoded, once it has asked; raises EOFError when it has ended."""

    def __init__(self, there: Connection) -> None:
        self._there = there
        self._is_asked, self._told = False, 0.0

    def listen(self) -> None:
        """Read what the run says."""
        self._there.recv()
        self._is_asked = True

    def tell(self, done: int, total: int) -> None:
        """Say how many images were decoded, now and then."""
        if self._is_asked and time.monotonic() - self._told > _REPORT_SECONDS:
            self._told = time.monotonic()
            self._there.send((done, total))


def _decode(unknown: Unknown, forked: Forked, index: ImageIndex, teller: _Teller) -> None:
    """Decode images, and put what was found into the table; those that cannot be used are left unknown."""
    if not len(unknown):
        return
    sizes, starts = _Sizes(), list[int]()
    done = 0

    def make_tasks() -> Iterator[list[Path | str]]:
        at = 0
        while at < len(unknown):
            end = min(at + sizes.images, len(unknown))
            starts.append(at)
            yield unknown.images(at, end)
            at = end

    def take(number: int, answer: tuple[float, list[Any]]) -> None:
        nonlocal done
        seconds, found = answer
        sizes.adapt(seconds, len(found))
        index.keep([row for known, row in filter(None, found) if row])
        unknown.note_all(starts[number], [one and one[0] for one in found])
        done += len(found)
        teller.tell(done, len(unknown))

    forked.run(_examine, make_tasks(), take)


class _Sizes:
    """How many images to put into a task, so that it takes about as long as another."""

    def __init__(self) -> None:
        self.images = 8

    def adapt(self, seconds: float, images: int) -> None:
        """Learn from a task."""
        wanted = int(images * _SECONDS / max(seconds, 1e-6))
        self.images = max(1, min(wanted, 4 * self.images, _MOST_IMAGES))


def _examine(images: list[Path | str]) -> tuple[float, list[Any]]:
    """Decode images; return the seconds it took and, for each, what was found and what to keep, or None."""
    began, index = time.monotonic(), _index(os.getpid())
    found: list[Any] = []
    for image in images:
        try:
            found.append(index.examine(image))
        except ImageError:
            found.append(None)
    return time.monotonic() - began, found


@cache
def _index(process: int) -> ImageIndex:
    """Return an index to read from; a process does not use the one of its parent."""
    return ImageIndex(index_path()).__enter__()

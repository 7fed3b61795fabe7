"""Reads a run's pairs, on Linux in processes of its own while torch is being imported. No torch here."""

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
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from caption_train.config.training import TrainOptions
from caption_train.data.columns.parts import Part, PartFound, Work
from caption_train.data.columns.table import SPLITS, Pairs, PairTable
from caption_train.data.image_index import ImageIndex
from caption_train.data.images import ImageError
from caption_train.errors import UsageError
from caption_train.shards.dataset import inspect_any_table
from caption_train.system.console import ProgressBar, escape_unprintable
from caption_train.system.files import cache_folder
from caption_train.system.processes import is_one_of_several
from caption_train.system.workers import count_cores
from caption_train.training.run.forked import Forked

_SECONDS = 0.2
"""Of work in a task."""
_MOST_IMAGES = 1000
"""In a task."""
_REPORT_SECONDS = 0.1


@dataclass
class Found:
    """What was read of a run's datasets.

    Attributes:
        train: pairs to train on.
        validation: pairs to validate on, of the same table.
        problems: one line per bad row or file.
        notes: what is odd but harms nothing.
    """

    train: Pairs
    validation: Pairs
    problems: list[str]
    notes: list[str] = field(default_factory=list)


def read_here(parts: Iterable[Part]) -> list[PartFound]:
    """Read parts of a dataset one after the other, with what is known of their images."""
    with ImageIndex(_index_path()) as index:
        return [_read_part(part, index) for part in parts]


def _read_part(part: Part, index: ImageIndex) -> PartFound:
    """Read a part of a dataset; of images that earlier runs have decoded, it has digest and size."""
    found = part.read()
    if found.stamps is not None:
        index.find_rows(found.table, found.stamps)
        found.stamps = None
    return found


def read_pairs(options: TrainOptions, work: Work = read_here) -> Found:
    """Read the pairs of all datasets of a run; no image is decoded.

    Args:
        options: the options of the run.
        work: reads the parts of a dataset.

    Raises:
        UsageError: a dataset cannot be read, or validation images are named twice.
    """
    tables, problems, notes = [], [], []
    folders = [folder for folder, _ in options.datasets]
    for number, folder in enumerate([*folders, *filter(None, [options.validation_dir])]):
        is_own = number < len(folders)
        if options.validation_split or not is_own:
            _refuse_second_validation(options, tables)
        pairs, more, odd = inspect_any_table(
            folder,
            caption_extensions=options.caption_extension,
            follow_symlinks=options.follow_symlinks,
            split=None,
            work=work,
        )
        table = pairs.table
        if is_own:
            table.dataset[:] = number
        else:
            table.split[:] = SPLITS.index("validation")
        tables.append(table)
        notes += odd
        named = is_own and options.add_dataset
        problems += [f"{escape_unprintable(folder)}: {line}" for line in more] if named else more
    if options.validation_split:
        _refuse_second_validation(options, tables)
    every = Pairs(PairTable.join(tables) if len(tables) > 1 else tables[0])
    splits = every.table.split
    return Found(*(every.keep(splits == SPLITS.index(s)) for s in ("train", "validation")), problems, notes)


def _refuse_second_validation(options: TrainOptions, tables: list[PairTable]) -> None:
    held_out = sum(int((table.split == SPLITS.index("validation")).sum()) for table in tables)
    if held_out:
        raise UsageError(
            f"--dataset_dir {options.dataset_dir}: {held_out} rows are held out for validation "
            "already; drop --validation_split or --validation_dir"
        )


@dataclass
class Unknown:
    """Images of pairs that no run has decoded yet, each once, in an order in which all processes agree.

    Attributes:
        table: has the pairs.
        rows: of the pairs, those with the same image side by side.
        starts: where in `rows` each image begins.
    """

    table: PairTable
    rows: np.ndarray
    starts: np.ndarray

    @classmethod
    def among(cls, *pairs: Pairs) -> Unknown:
        """Find them among pairs of one table."""
        table = pairs[0].table
        rows = np.concatenate([some.rows for some in pairs])
        rows = rows[table.pixels[rows] == 0]
        # By name: comparing paths part by part takes ten times as long.
        names = list(table.image_names(rows))
        order = sorted(range(len(names)), key=names.__getitem__)
        starts = [at for at, n in enumerate(order) if not at or names[n] != names[order[at - 1]]]
        return cls(table, rows[np.array(order, np.int64)], np.array(starts, np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def image(self, number: int) -> Path:
        """Return one image."""
        return self.table.image(int(self.rows[self.starts[number]]))

    def rows_of(self, number: int) -> np.ndarray:
        """Return the rows of an image's pairs."""
        end = self.starts[number + 1] if number + 1 < len(self) else len(self.rows)
        return self.rows[self.starts[number] : end]

    def images(self, start: int, end: int) -> list[Path | str]:
        """Return some images; files of their own as strings, which take less time to make and send."""
        rows = self.rows[self.starts[start:end]]
        if any(place.container or place.only for place in self.table.places):
            return [self.table.image(row) for row in rows.tolist()]
        return list(self.table.image_names(rows))

    def note_all(self, start: int, found: list[tuple[str, int] | None]) -> None:
        """Put what was found in images into the table, from one number on; None where nothing was."""
        numbers = start + np.flatnonzero([one is not None for one in found])
        known = [one for one in found if one is not None]
        rows = self.rows[self.starts[numbers]]
        digests = bytes.fromhex("".join(digest for digest, _ in known))
        self.table.digest[rows] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self.table.pixels[rows] = [pixels for _, pixels in known]
        if len(self.rows) > len(self):
            for number, one in zip(numbers.tolist(), known, strict=True):
                self.note(number, *one)

    def note(self, number: int, digest: str, pixels: int) -> None:
        """Put what was found in an image into the table."""
        rows = self.rows_of(number)
        self.table.digest[rows] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        self.table.pixels[rows] = pixels


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
        with Forked(count_cores(), there, teller.listen) as forked, ImageIndex(_index_path()) as index:
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
    return _read_part(part, index), index.take_used()


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
    return ImageIndex(_index_path()).__enter__()


def _index_path() -> Path:
    return cache_folder("images") / "index.sqlite"

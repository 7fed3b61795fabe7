"""Reads a run's pairs, on Linux in a process of its own while torch is being imported. No torch here."""

import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

from caption_train.config.training import TrainOptions
from caption_train.data.pairs import Pair
from caption_train.errors import UsageError
from caption_train.shards.dataset import inspect_any_dataset
from caption_train.system.console import escape_unprintable
from caption_train.system.processes import is_one_of_several


@dataclass
class Found:
    """What was read of a run's datasets.

    Attributes:
        train: pairs to train on.
        validation: pairs to validate on.
        problems: one line per bad row or file.
        images: image → its SHA-256 and how many pixels it has, of those that were decoded so far or before.
    """

    train: list[Pair]
    validation: list[Pair]
    problems: list[str]
    images: dict[Path, tuple[str, int]] = field(default_factory=dict)


def read_pairs(options: TrainOptions) -> Found:
    """Read the pairs of all datasets of a run; no image is decoded.

    Raises:
        UsageError: a dataset cannot be read, or validation images are named twice.
    """
    pairs, problems = [], []
    for number, (folder, _) in enumerate(options.datasets):
        found, more = _inspect(options, folder)
        pairs += [replace(pair, dataset=number) for pair in found] if number else found
        problems += (
            [f"{escape_unprintable(folder)}: {line}" for line in more] if options.add_dataset else more
        )
    train = [pair for pair in pairs if pair.split == "train"]
    validation = [pair for pair in pairs if pair.split == "validation"]
    if validation and (options.validation_split or options.validation_dir):
        raise UsageError(
            f"--dataset_dir {options.dataset_dir}: {len(validation)} rows are held out for validation "
            "already; drop --validation_split or --validation_dir"
        )
    if options.validation_dir:
        validation, more = _inspect(options, options.validation_dir)
        validation = [replace(pair, split="validation") for pair in validation]
        problems += more
    return Found(train, validation, problems)


def _inspect(options: TrainOptions, folder: Path) -> tuple[list[Pair], list[str]]:
    return inspect_any_dataset(
        folder,
        caption_extensions=options.caption_extension,
        follow_symlinks=options.follow_symlinks,
        split=None,
    )


def list_images(pairs: Sequence[Pair]) -> list[Path]:
    """Return the images of pairs, each once, in an order in which all processes agree."""
    # By name: comparing paths part by part takes ten times as long.
    return sorted({pair.image for pair in pairs}, key=str)


class Ahead:
    """A process that reads a run's datasets, and decodes images that no run knows yet, until it is asked.

    What goes wrong in it is found again by who asks, so it says nothing of its own.
    """

    def __init__(self, options: TrainOptions) -> None:
        # A fork: what is imported by now need not be imported again. It ends with this process.
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_work, args=(options, there, self._here), daemon=True)
        self._process.start()
        there.close()

    def take(self) -> Found | None:
        """Return what was read by now; None if the process failed."""
        found = None
        with suppress(OSError):  # It has ended, and what it found is in the pipe.
            self._here.send("enough")
        with suppress(OSError, EOFError):
            found = self._here.recv()
        self._here.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return found


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
    """Read, and send what was found when asked to, or when there is nothing left."""
    here.close()
    gc.disable()
    # After Ctrl-C the run itself ends, and this process with it; its pipe is closed then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(Exception):
        found = read_pairs(options)
        with suppress(Exception):
            _decode(found, there)
        there.send(found)


def _decode(found: Found, there: Connection) -> None:
    from caption_train.data.image_index import ImageIndex
    from caption_train.data.images import ImageError
    from caption_train.system.files import cache_folder

    images = list_images(found.train + found.validation)
    with ImageIndex(cache_folder("images") / "index.sqlite") as index:
        found.images.update(index.find(images))
        for image in images:
            if there.poll():
                return
            if image not in found.images:
                with suppress(ImageError):
                    found.images[image] = index.inspect(image)

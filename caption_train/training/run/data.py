"""Reads a run's training and validation pairs, and checks every image before training starts."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from caption_train.config.training import TrainOptions
from caption_train.data.columns.table import Pairs
from caption_train.data.image_index import inspect_images
from caption_train.data.images import ImageError
from caption_train.data.pairs import Pair
from caption_train.data.split import fingerprint_named, name_images, split_by_content
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, print_line, print_once, summarize
from caption_train.system.memory import pausing_garbage_collection
from caption_train.training.distributed.ranks import check_same_on_all_ranks, raise_on_all_ranks
from caption_train.training.run.ahead import Ahead
from caption_train.training.run.reading import read_pairs
from caption_train.training.run.unknown import Unknown

NEED_VALIDATION = (
    *("validation_split", "validation_dir", "eval_every_n_epochs", "eval_every_n_steps"),
    *("metrics", "early_stopping_patience", "load_best_at_end"),
)


class TrainingData:
    """The data of a run.

    Args:
        train: good pairs to train on.
        validation: good pairs to validate on, of the same table.
        skipped: one line per row or file that was left out.
        digests: image → SHA-256; of pairs in columns, these are in them.
        pixels: image → how many pixels it has; the same.
    """

    def __init__(
        self,
        train: Sequence[Pair],
        validation: Sequence[Pair] = (),
        skipped: Sequence[str] = (),
        digests: Mapping[Path, str] | None = None,
        pixels: Mapping[Path, int] | None = None,
    ) -> None:
        if not isinstance(train, Pairs):
            every = Pairs.of([*train, *validation], digests, pixels)
            train, validation = every[: len(train)], every[len(train) :]
        self.train: Pairs = train
        self.validation: Pairs = validation or train[:0]
        self.skipped = list(skipped)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingData) and all(
            getattr(self, name) == getattr(other, name)
            for name in ("train", "validation", "skipped", "digests", "pixels")
        )

    __hash__ = None

    @property
    def digests(self) -> dict[Path, str]:
        """Image → SHA-256, of all images: made when it is asked for, and large."""
        every = self.train + self.validation
        return {pair.image: digest for pair, digest in zip(every, every.digests(), strict=True)}

    @property
    def pixels(self) -> dict[Path, int]:
        """Image → how many pixels it has, of all images: made when it is asked for, and large."""
        every = self.train + self.validation
        return dict(zip((pair.image for pair in every), every.pixels.tolist(), strict=True))

    def measure_megapixels(self) -> float:
        """Return how many megapixels an image has, on average."""
        every = self.train + self.validation
        found = every.table.pixels[np.unique(every.rows)]
        return float(found.mean()) / 1e6 if len(found) else 0.0

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data wherever its folder is. The order counts: batches depend on it."""
        described = {"pairs": len(self.train)}
        for start, pairs in (("", self.train), ("held-out ", self.validation)):
            if start and pairs:
                described[f"{start}pairs"] = len(pairs)
            if pairs or not start:
                fingerprint, order = _identify(pairs)
                described |= {f"{start}fingerprint": fingerprint, f"{start}order": order}
        return described

    def find_worst(self, count: int) -> list[Pair]:
        """Return `count` pairs of the longest captions and the largest images, which need the most memory."""
        lengths = np.fromiter(map(len, self.train.captions()), np.int64, len(self.train))
        longest, largest = (
            (self.train[int(place)] for place in np.argsort(-values, kind="stable")[:count])
            for values in (lengths, self.train.pixels)
        )
        return [replace(pair, image=other.image) for pair, other in zip(longest, largest, strict=False)]

    def describe_cut(self, tokenize: Callable[[str], list[int]], max_length: int) -> str | None:
        """Return a line about captions with more tokens than `--max_length`, or None if there are none.

        Args:
            tokenize: returns the ids of a caption, as `Family.tokenize_caption` does.
            max_length: the limit in tokens, end token included.
        """
        # A token is at least one byte long, so most captions need not be tokenized.
        every = self.train + self.validation
        long = every.keep(every.table.captions.lengths(every.rows) >= max_length)
        counts = {pair: len(tokenize(pair.caption)) + 1 for pair in long}
        cut = [pair for pair in long if counts[pair] > max_length]
        if not cut:
            return None
        longest = max(cut, key=counts.__getitem__)
        return (
            f"--max_length {max_length}: {len(cut)} captions are longer and are cut, the longest of "
            f"{counts[longest]:,} tokens in {escape_unprintable(longest.source)}"
        )


def read_training_data(
    options: TrainOptions, accelerator: Accelerator, ahead: Ahead | None = None
) -> TrainingData:
    """Read and check the dataset of a run.

    Validation pairs are those in `--validation_dir`, those that `--validation_split` holds out, or the rows
    with the split "validation" in the metadata.

    Args:
        options: the options of the run.
        accelerator: each of its processes decodes its share of the images.
        ahead: what began to read them already, if anything did.

    Raises:
        CaptionTrainError: lists all bad rows and files, unless `--on_bad_data skip` leaves them out.
        UsageError: no pair is left, or validation images are needed and there are none.
    """
    with raise_on_all_ranks(accelerator), pausing_garbage_collection():
        found = (ahead and ahead.take()) or read_pairs(options)
        data = TrainingData(found.train, found.validation, found.problems)
    print_line(*found.notes)
    if accelerator.num_processes > 1:
        # Each image is decoded by one process for all, so all must have the same files.
        _check_same_rows(accelerator, data)
    _inspect_images(data, accelerator)
    with raise_on_all_ranks(accelerator):
        if options.validation_split:
            data.train, data.validation = split_by_content(data.train, options.validation_split, options.seed)
        _refuse_or_report(data, options, accelerator)
    # After the split, which counts every image once.
    weights = np.array([weight for _, weight in options.datasets])
    if (weights != 1).any():
        train = data.train
        data.train = Pairs(train.table, np.repeat(train.rows, weights[train.table.dataset[train.rows]]))
    return data


def _refuse_or_report(data: TrainingData, options: TrainOptions, accelerator: Accelerator) -> None:
    """Raise if the data does not allow what was asked for; otherwise print what was left out."""
    if data.skipped and options.on_bad_data == "stop":
        headline = f"{len(data.skipped)} bad rows or files (--on_bad_data skip leaves them out):"
        raise CaptionTrainError(summarize(headline, data.skipped, limit=None))
    if data.skipped:
        headline = f"--on_bad_data skip: {len(data.skipped)} left out:"
        print_once(accelerator, summarize(headline, data.skipped, limit=None))
    if not data.train:
        raise UsageError(f"--dataset_dir {options.dataset_dir}: no pair is left to train on")
    if options.validation_split and not data.validation:
        raise UsageError(
            f"--validation_split {options.validation_split}: all images are copies of one another, which are "
            "never split; give --validation_dir"
        )
    asking = [name for name in NEED_VALIDATION if getattr(options, name)]
    if asking and not data.validation:
        raise UsageError(
            f"--{asking[0]} needs validation images: give --validation_split 0.1 or --validation_dir, or "
            "name a split in metadata.jsonl"
        )


def _check_same_rows(accelerator: Accelerator, data: TrainingData) -> None:
    """Raise a UsageError that names images of which the processes have other files, captions or prompts."""
    rows = _list_rows(data)
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(f"{name}\0{rows[name]}\n".encode("utf-8", "surrogatepass"))
    # What differs is only sent around where something does: a dataset may have a million images.
    if len(set(gather_object([digest.hexdigest()]))) > 1:
        check_same_on_all_ranks(accelerator, rows)


def _list_rows(data: TrainingData) -> dict[str, str]:
    """Return image → a hash of its size, captions, prompts and splits, to compare what each process reads."""
    rows: dict[str, list] = {}
    every = data.train + data.validation
    facts = zip(every.captions(), every.prompts(), every.splits(), strict=True)
    sizes = every.table.size[every.rows].tolist()
    for name, size, fact in zip(every.image_names(), sizes, facts, strict=True):
        rows.setdefault(name, [size]).append(fact)
    return {
        f"{name} with its caption": hashlib.sha256(repr(row).encode()).hexdigest()[:8]
        for name, row in rows.items()
    }


def _inspect_images(data: TrainingData, accelerator: Accelerator) -> None:
    """Decode every image that is not known; leave out pairs with bad images. Each process does its share."""
    pixels = data.train.table.pixels
    # Shares are numbers among the unknown ones. Indexes may differ: of machines, or with what other runs add.
    if len(set(gather_object([hashlib.sha256((pixels == 0).tobytes()).hexdigest()]))) > 1:
        pixels[:] = 0
    unknown = Unknown.among(data.train, data.validation)
    share = range(accelerator.process_index, len(unknown), accelerator.num_processes)
    images = [unknown.image(number) for number in share]
    inspected = inspect_images(images, show_progress=accelerator.is_main_process) if images else []
    found_here = [
        (number, str(found) if isinstance(found, ImageError) else found)
        for number, found in zip(share, inspected, strict=True)
    ]
    bad: dict[Path, str] = {}
    is_bad = np.zeros(len(data.train.table), bool)
    for number, found in gather_object(found_here):
        if isinstance(found, str):
            bad[unknown.image(number)] = found
            is_bad[unknown.rows_of(number)] = True
        else:
            unknown.note(number, *found)
    if bad:
        data.train = data.train.keep(~is_bad[data.train.rows])
        data.validation = data.validation.keep(~is_bad[data.validation.rows])
        data.skipped += [bad[image] for image in sorted(bad)]


def _identify(pairs: Pairs) -> tuple[str, str]:
    """Return fingerprint and a hash of the order; of several datasets, hashes without their places."""
    datasets = pairs.table.dataset[pairs.rows]
    numbers = np.unique(datasets).tolist()
    if numbers in ([], [0]):
        return _identify_one(pairs)
    parts = [(number, *_identify_one(pairs.keep(datasets == number))) for number in numbers]
    fingerprints, orders = ([[part[0], part[which]] for part in parts] for which in (1, 2))
    return tuple(hashlib.sha256(json.dumps(some).encode()).hexdigest() for some in (fingerprints, orders))


def _identify_one(pairs: Pairs) -> tuple[str, str]:
    names = name_images(pairs) if pairs else []
    order = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return fingerprint_named(pairs, names), order

"""Reads a run's training and validation pairs, and checks every image before training starts."""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from caption_train.config.training import TrainOptions
from caption_train.data.image_index import inspect_images
from caption_train.data.images import ImageError
from caption_train.data.pairs import Pair
from caption_train.data.split import fingerprint, name_images, split_by_content
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, print_once, summarize
from caption_train.training.distributed.ranks import check_same_on_all_ranks, raise_on_all_ranks
from caption_train.training.run.reading import Ahead, list_images, read_pairs

NEED_VALIDATION = (
    *("validation_split", "validation_dir", "eval_every_n_epochs", "eval_every_n_steps"),
    *("metrics", "early_stopping_patience", "load_best_at_end"),
)


@dataclass
class TrainingData:
    """The data of a run.

    Attributes:
        train: good pairs to train on.
        validation: good pairs to validate on.
        skipped: one line per row or file that was left out.
        digests: image → SHA-256.
        pixels: image → how many pixels it has.
    """

    train: list[Pair]
    validation: list[Pair] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    digests: dict[Path, str] = field(default_factory=dict)
    pixels: dict[Path, int] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data wherever its folder is. The order counts: batches depend on it."""
        described = {
            "pairs": len(self.train),
            "fingerprint": self._identify(self.train, lambda pairs: fingerprint(pairs, self.digests)),
            "order": self._identify(self.train, _hash_order),
        }
        if self.validation:
            described |= {
                "held-out pairs": len(self.validation),
                "held-out fingerprint": self._identify(
                    self.validation, lambda pairs: fingerprint(pairs, self.digests)
                ),
                "held-out order": self._identify(self.validation, _hash_order),
            }
        return described

    def _identify(self, pairs: Sequence[Pair], identify: Callable[[Sequence[Pair]], str]) -> str:
        """Return what `identify` says of one dataset; of several, a hash without their places."""
        numbers = sorted({pair.dataset for pair in pairs})
        if numbers in ([], [0]):
            return identify(pairs)
        parts = [[n, identify([pair for pair in pairs if pair.dataset == n])] for n in numbers]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def find_worst(self, count: int) -> list[Pair]:
        """Return `count` pairs of the longest captions and the largest images, which need the most memory."""
        longest = sorted(self.train, key=lambda pair: len(pair.caption), reverse=True)[:count]
        largest = sorted(self.train, key=lambda pair: self.pixels.get(pair.image, 0), reverse=True)
        return [replace(pair, image=other.image) for pair, other in zip(longest, largest, strict=False)]

    def describe_cut(self, tokenize: Callable[[str], list[int]], max_length: int) -> str | None:
        """Return a line about captions with more tokens than `--max_length`, or None if there are none.

        Args:
            tokenize: returns the ids of a caption, as `Family.tokenize_caption` does.
            max_length: the limit in tokens, end token included.
        """
        # A token is at least one byte long, so most captions need not be tokenized.
        long = [p for p in self.train + self.validation if len(p.caption.encode()) >= max_length]
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
    with raise_on_all_ranks(accelerator), _without_garbage_collection():
        found = (ahead and ahead.take()) or read_pairs(options)
        data = TrainingData(found.train, found.validation, found.problems)
    if accelerator.num_processes > 1:
        # Each image is decoded by one process for all, so all must have the same files.
        check_same_on_all_ranks(accelerator, _list_rows(data))
    _inspect_images(data, accelerator, found.images)
    with raise_on_all_ranks(accelerator):
        if options.validation_split:
            data.train, data.validation = split_by_content(
                data.train, options.validation_split, options.seed, data.digests
            )
        _refuse_or_report(data, options, accelerator)
    # After the split, which counts every image once.
    weights = [weight for _, weight in options.datasets]
    data.train = [pair for pair in data.train for _ in range(weights[pair.dataset])]
    return data


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause what looks for cycles: among pairs there are none, and it goes through all of torch each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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


def _list_rows(data: TrainingData) -> dict[str, str]:
    """Return image → a hash of its size, captions, prompts and splits, to compare what each process reads."""
    rows: dict[str, list] = {}
    for pair in data.train + data.validation:
        with suppress(OSError):
            rows.setdefault(str(pair.image), [pair.image.stat().st_size])
        rows.setdefault(str(pair.image), []).append((pair.caption, pair.prompt, pair.split))
    return {
        f"{name} with its caption": hashlib.sha256(repr(row).encode()).hexdigest()[:8]
        for name, row in rows.items()
    }


def _inspect_images(
    data: TrainingData, accelerator: Accelerator, known: Mapping[Path, tuple[str, int]]
) -> None:
    """Decode every image that is not known; leave out pairs with bad images. Each process does its share."""
    images = list_images(data.train + data.validation)
    share = images[accelerator.process_index :: accelerator.num_processes]
    unknown = [image for image in share if image not in known]
    results: dict[Path, Any] = {image: known[image] for image in share if image in known}
    inspected = inspect_images(unknown, show_progress=accelerator.is_main_process) if unknown else []
    results.update(zip(unknown, inspected, strict=True))
    found_here = [(i, str(r) if isinstance(r, ImageError) else r) for i, r in results.items()]
    bad = {}
    for image, found in gather_object(found_here):
        if isinstance(found, str):
            bad[image] = found
        else:
            data.digests[image], data.pixels[image] = found
    data.train = [pair for pair in data.train if pair.image not in bad]
    data.validation = [pair for pair in data.validation if pair.image not in bad]
    data.skipped += [bad[image] for image in sorted(bad)]


def _hash_order(pairs: Sequence[Pair]) -> str:
    names = "\n".join(name_images(pairs))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]

"""Decides which images of a dataset are evaluated, and collects the references of each. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_train.adapters.record import TRAINING_FILE, find_adapter
from caption_train.config.evaluation import EvaluateOptions
from caption_train.data.formats import CAPTION_SUFFIXES, METADATA_NAME
from caption_train.data.images import ImageError, check_images
from caption_train.data.pairs import Pair
from caption_train.data.scan import Folder, scan_folder
from caption_train.data.split import fingerprint, rank_images, split_by_content
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.shards.dataset import is_in_shards, read_any_dataset
from caption_train.system.console import escape_unprintable
from caption_train.system.files import hash_file, read_json_object


@dataclass(frozen=True)
class Question:
    """An image to caption.

    Attributes:
        image: the file; of several with equal bytes, the first.
        name: its path below the dataset folder.
        digest: SHA-256 of its bytes.
        prompt: the row's own prompt; None means the model's.
        references: its captions in the dataset, perhaps none.
    """

    image: Path
    name: str
    digest: str
    prompt: str | None
    references: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """What is evaluated.

    Attributes:
        questions: each image and prompt once.
        split: which images those are, in words.
        unreadable: a line for each file that cannot be read.
    """

    questions: Sequence[Question]
    split: str
    unreadable: Sequence[str] = ()

    @property
    def has_references(self) -> bool:
        """Whether there is something to score captions against."""
        return any(question.references for question in self.questions)


def read_questions(options: EvaluateOptions) -> EvaluationSet:
    """Return the images to caption.

    A folder without any caption gives all its images. Copies of an image are one image, with the captions of
    all of them for references.

    Raises:
        UsageError: there is no image, or none in the split that was asked for.
        CaptionTrainError: rows or files of the dataset are bad.
    """
    root = options.dataset_dir
    trained = _read_training(options.peft_model[0]) if options.peft_model else {}
    extensions = (trained.get("options") or {}).get("caption_extension")
    if not _are_texts(extensions):
        extensions = CAPTION_SUFFIXES
    in_shards = is_in_shards(root)
    folder = (
        Folder(root) if in_shards else scan_folder(root, extensions, follow_symlinks=options.follow_symlinks)
    )
    if not in_shards and not folder.images and not (root / METADATA_NAME).exists():
        raise UsageError(f"--dataset_dir {escape_unprintable(root)}: no images there")
    if not in_shards and not folder.captions and not (root / METADATA_NAME).exists():
        pairs = [Pair(root / name, "", name) for name in folder.images]
        chosen, split = pairs, "all images, which have no captions"
        digests, unreadable = _hash([pair.image for pair in pairs])
    else:
        pairs = read_any_dataset(
            root, caption_extensions=extensions, follow_symlinks=options.follow_symlinks, split=None
        )
        digests, unreadable = _hash([pair.image for pair in pairs])
        pairs = [pair for pair in pairs if pair.image in digests]
        chosen, split = _choose(pairs, digests, options, trained)
    questions = _merge([pair for pair in chosen if pair.image in digests], digests, root)
    if options.limit is not None and options.limit < len(questions):
        ranked = rank_images((question.digest for question in questions), options.seed)
        kept = set(ranked[: options.limit])
        questions = [question for question in questions if question.digest in kept][: options.limit]
        split = f"{options.limit} of {split}"
    if not questions:
        raise CaptionTrainError(
            f"--dataset_dir {escape_unprintable(root)}: none of {len(unreadable)} images can be read; "
            f"the first: {unreadable[0]}"
        )
    return EvaluationSet(questions, split, unreadable)


def _choose(
    pairs: Sequence[Pair], digests: dict[Path, str], options: EvaluateOptions, trained: dict
) -> tuple[Sequence[Pair], str]:
    """Return the pairs of `--split`, and which those are in words."""
    if options.split == "all":
        return pairs, "all images"
    if options.split != "auto":
        chosen = [pair for pair in pairs if pair.split == options.split]
        if not chosen:
            raise UsageError(
                f"--split {options.split}: none of {len(pairs)} pairs is in it; --split all takes all"
            )
        return chosen, f"the split {options.split}"
    if validation := [pair for pair in pairs if pair.split == "validation"]:
        return validation, "the split validation"
    if held_out := _find_held_out(pairs, digests, trained):
        return held_out, "the images that the adapter's run held out of this dataset"
    return pairs, "all images"


def _find_held_out(pairs: Sequence[Pair], digests: dict[Path, str], trained: dict) -> Sequence[Pair]:
    """Return the pairs that a run's `--validation_split` held out, if this is the dataset of that run."""
    options, dataset = trained.get("options") or {}, trained.get("dataset") or {}
    fraction, seed = options.get("validation_split"), options.get("seed")
    if not (isinstance(fraction, int | float) and 0 < fraction < 1 and isinstance(seed, int)):
        return []
    _, held_out = split_by_content([p for p in pairs if p.split == "train"], fraction, seed, digests)
    return held_out if fingerprint(held_out, digests) == dataset.get("held-out fingerprint") else []


def _read_training(folder: Path) -> dict:
    try:
        return read_json_object(find_adapter(folder) / TRAINING_FILE, {"options": dict, "dataset": dict})
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _hash(images: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Return image → SHA-256, and a line for each file that cannot be read."""
    images = list(dict.fromkeys(images))
    found = dict(zip(images, check_images(images, inspect=_hash_image), strict=True))
    bad = [str(result) for result in found.values() if isinstance(result, ImageError)]
    return {image: result for image, result in found.items() if isinstance(result, str)}, bad


def _hash_image(image: Path) -> str:
    try:
        return hash_file(image)
    except OSError as error:
        raise ImageError(f"{escape_unprintable(image)}: {error.strerror or error}") from error


def _merge(pairs: Sequence[Pair], digests: dict[Path, str], root: Path) -> list[Question]:
    found: dict[tuple[str, str | None], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((digests[pair.image], pair.prompt), []).append(pair)
    return [
        Question(
            same[0].image,
            _name(same[0].image, root),
            digest,
            prompt,
            tuple(dict.fromkeys(pair.caption for pair in same if pair.caption)),
        )
        for (digest, prompt), same in found.items()
    ]


def _name(image: Path, root: Path) -> str:
    return escape_unprintable(image.relative_to(root).as_posix() if image.is_relative_to(root) else image)

"""Examines a dataset and writes the page about it: what can fail is tried before the work begins."""

from __future__ import annotations

import os
import stat
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from caption_train.config.compiling import CompileOptions
from caption_train.data.copies import find_copies
from caption_train.data.scan import image_id
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.examining.captions import Tokens, count_tags, count_tokens, load_tokens
from caption_train.examining.findings import Examined, Found, Named, list_findings
from caption_train.examining.images import Measured, measure_images
from caption_train.metrics.tags import are_tags
from caption_train.reporting.dataset import (
    Card,
    Count,
    DatasetReport,
    Distribution,
    Finding,
    Group,
    Tags,
    write_dataset_report,
)
from caption_train.reporting.histogram import make_histogram
from caption_train.system.console import count_things, escape_unprintable

EXTRA = "imagehash"
MOST_CARDS, MOST_GROUPS, MOST_IN_GROUP, MOST_TAGS = 40, 20, 8, 90
SHOWN_CAPTION, SHOWN_NAME, SHOWN_TAG = 280, 200, 60
LARGEST_PICTURE = 14_000
REVIEW_ADDRESS = "http://127.0.0.1:7860/"


@dataclass(frozen=True)
class Dataset:
    """A dataset as it was found.

    Attributes:
        root: its folder.
        images: all of its images.
        captions: (image, caption) pairs; an image may have several.
        without_caption: images.
    """

    root: Path
    images: Sequence[str]
    captions: Sequence[tuple[str, str]]
    without_caption: Sequence[str]


@dataclass(frozen=True)
class Review:
    """How to review what is shown. command: opens the page. name_of: an image's name there, or None."""

    command: str
    name_of: Callable[[str], str | None]


class Examination:
    """The examination of one dataset.

    Args:
        options: those of compile_captions.py, with `report`.

    Raises:
        UsageError: the page cannot be written, or a library is missing.
        CaptionTrainError: the tokenizer of `--family` cannot be had.
    """

    def __init__(self, options: CompileOptions) -> None:
        self.path = Path(options.report or "")
        _check_path(self.path)
        if find_spec(EXTRA) is None:
            raise UsageError(
                f"--report finds near-duplicates with {EXTRA}: install with pip install '.[report]', or "
                f"pip install {EXTRA}"
            )
        self._tokens: Tokens | None = load_tokens(options)
        self._dataset: Dataset | None = None
        self._data = Examined((), {}, {}, ())

    def measure(self, dataset: Dataset) -> dict[str, str]:
        """Open all images and count all tokens, with progress bars; return image → why it cannot be used."""
        paths = [dataset.root / name for name in dataset.images]
        results = dict(zip(dataset.images, measure_images(paths), strict=True))
        broken = {
            name: str(result).removeprefix(f"{escape_unprintable(dataset.root / name)}: ")
            for name, result in results.items()
            if not isinstance(result, Measured)
        }
        sound = {name: result for name, result in results.items() if isinstance(result, Measured)}
        tokens = self._tokens
        counts = tokens and count_tokens([caption for _, caption in dataset.captions], tokens)
        self._dataset = dataset
        self._data = Examined(
            dataset.captions,
            sound,
            broken,
            dataset.without_caption,
            counts,
            tokens.limit if tokens else 0,
            tokens.names if tokens else frozenset(),
        )
        return broken

    def write(self, counts: Sequence[Count], review: Review) -> None:
        """Write the page of what was measured.

        Args:
            counts: what else was found, used or not.
            review: how to review it.

        Raises:
            CaptionTrainError: it cannot be written.
        """
        assert self._dataset is not None
        root, data = self._dataset.root, self._data
        found = list_findings(data, lambda names: find_copies({name: root / name for name in names}))
        pictures = _Pictures(root, data, review)
        findings = [pictures.show(one) for one in found]
        captions = [caption for _, caption in data.captions]
        report = DatasetReport(
            title=f"Dataset {escape_unprintable(root.resolve().name or root)}",
            facts=[
                ("Folder", escape_unprintable(root)),
                ("Images", f"{len(self._dataset.images):,}"),
                ("Captions", f"{len(captions):,}"),
                ("Images without a caption", f"{len(data.without_caption):,}"),
            ],
            counts=counts,
            distributions=list(self._measure_lengths(captions)),
            findings=findings,
            tags=_list_tags(captions) if are_tags(captions) else None,
            pictures=pictures.make(),
            review_command=escape_unprintable(review.command),
            review_address=REVIEW_ADDRESS,
        )
        try:
            write_dataset_report(self.path, report)
        except OSError as error:
            raise CaptionTrainError(
                f"--report {escape_unprintable(self.path)}: {error.strerror or error}"
            ) from error

    def _measure_lengths(self, captions: Sequence[str]) -> Iterable[Distribution]:
        data, tokens = self._data, self._tokens
        if captions:
            words = [len(caption.split()) for caption in captions]
            title = "Words in a caption"
            yield Distribution(title, make_histogram(words, title, "words"), _describe(words))
        if data.tokens and tokens:
            cut = sum(count > data.limit for count in data.tokens)
            title = f"Tokens of {tokens.title} in a caption"
            histogram = make_histogram(
                data.tokens, title, "tokens", limit=data.limit + 1, limit_label=f"cut after {data.limit:,}"
            )
            cut_words = f"{count_things(cut, 'caption')} {'is' if cut == 1 else 'are'} cut"
            note = (
                f"By the tokenizer of {escape_unprintable(tokens.model_id)}, start and end included. "
                f"Training keeps {data.limit:,}: {cut_words} ({100 * cut / len(data.tokens):.1f} %)."
            )
            yield Distribution(title, histogram, _describe(data.tokens), note)
        if data.sound:
            sides = [min(measured.width, measured.height) for measured in data.sound.values()]
            title = "Shorter side of an image"
            yield Distribution(
                title, make_histogram(sides, title, "pixels"), _describe(sides, ("smallest", "largest"))
            )


class _Pictures:
    """Turns findings into cards, and keeps which images need a small picture, each once."""

    def __init__(self, root: Path, data: Examined, review: Review) -> None:
        self._root, self._data, self._review = root, data, review
        self._captions: dict[str, str] = {}
        for name, caption in data.captions:
            self._captions.setdefault(name, caption)
        self._places: dict[str, int] = {}

    def show(self, found: Found) -> Finding:
        """Return what the page shows of a finding."""
        is_grouped = len(found.groups) > 1 or any(title for title, _ in found.groups)
        most = MOST_IN_GROUP if is_grouped else MOST_CARDS
        groups = [
            Group(
                [self._make_card(named) for named in members[:most]], len(members), _clip(title, SHOWN_NAME)
            )
            for title, members in found.groups[:MOST_GROUPS]
        ]
        count = sum(len(members) for _, members in found.groups)
        return Finding(found.key, found.title, found.rule, count, found.unit, groups, len(found.groups))

    def make(self) -> list:
        """Return the small pictures of all cards, in the order of their places."""
        from caption_train.reporting.thumbnails import make_thumbnails

        paths = [self._root / name for name in self._places]
        return make_thumbnails(
            paths,
            show_progress=True,
            largest=LARGEST_PICTURE,
            label="making thumbnails",
        )

    def _make_card(self, named: Named) -> Card:
        place = None
        if named.name in self._data.sound:
            place = self._places.setdefault(named.name, len(self._places))
        there = self._review.name_of(named.name)
        caption = self._captions.get(named.name, "") if named.caption is None else named.caption
        return Card(
            _clip(named.name, SHOWN_NAME),
            _clip(named.note, SHOWN_CAPTION),
            _clip(caption, SHOWN_CAPTION),
            image_id(there) if there is not None else "",
            place,
        )


def _clip(text: str, most: int) -> str:
    text = escape_unprintable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _list_tags(captions: Sequence[str]) -> Tags:
    tags = count_tags(captions)
    rows = sorted(tags.items(), key=lambda row: (-row[1], row[0]))[:MOST_TAGS]
    once = sum(count == 1 for count in tags.values())
    return Tags([(_clip(tag, SHOWN_TAG), count) for tag, count in rows], len(tags), once, len(captions))


def _describe(
    values: Sequence[int], ends: tuple[str, str] = ("shortest", "longest")
) -> list[tuple[str, str]]:
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return [
        (ends[0], f"{ordered[0]:,}"),
        ("median", f"{statistics.median(ordered):,.0f}"),
        ("95 % up to", f"{last:,}"),
        (ends[1], f"{ordered[-1]:,}"),
    ]


def _check_path(path: Path) -> None:
    """Raise UsageError where a page cannot be written, in the time that nobody has waited for it yet."""
    shown, folder = escape_unprintable(path), path.parent
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise UsageError(f"--report {shown}: {getattr(error, 'strerror', None) or error}") from error
    if mode and stat.S_ISDIR(mode):
        raise UsageError(f"--report {shown}: is a folder; name a file such as dataset.html")
    if mode and not stat.S_ISREG(mode):
        raise UsageError(f"--report {shown}: is no regular file")
    if not folder.is_dir():
        raise UsageError(f"--report {shown}: there is no folder {escape_unprintable(folder)}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--report {shown}: nothing can be written to {escape_unprintable(folder)}")


def list_counts(rows: Iterable[tuple[str, Sequence[str] | int, str]], most: int = 20) -> list[Count]:
    """Return the table of counts.

    Args:
        rows: (what it is, the files or how many, what becomes of them).
        most: how many files are named.
    """
    return [
        Count(label, files, note)
        if isinstance(files, int)
        else Count(label, len(files), note, [_clip(name, SHOWN_CAPTION) for name in files[:most]])
        for label, files, note in rows
    ]

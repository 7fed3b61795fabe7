"""Counts what happened to every image, and lists captions worth checking. Standard library only."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from caption_train.captioning.storage.names import FirstLines, FirstNames
from caption_train.metrics.output_health import REMARKS
from caption_train.system.console import count_things, escape_unprintable


@dataclass
class CaptioningSummary:
    """Counts of a run, or of one of its processes.

    Attributes:
        written: images captioned.
        kept: images that had a caption already.
        unreadable: images that could not be read, each with the reason.
        remarked: remark → names of images.
        seconds: time spent captioning.
        left: images that `--limit` leaves.
        meanwhile: images whose caption somebody else wrote during the run.
        noted: digests of their names.
    """

    written: int = 0
    kept: int = 0
    unreadable: list[str] = field(default_factory=FirstLines)
    remarked: dict[str, FirstNames] = field(
        default_factory=lambda: {remark: FirstNames() for remark in REMARKS}
    )
    seconds: float = 0.0
    meanwhile: FirstNames = field(default_factory=FirstNames)
    left: int = 0
    adds: bool = False
    noted: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not isinstance(self.unreadable, FirstLines):
            self.unreadable = FirstLines(self.unreadable)

    def count(self, name: str, remarks: Sequence[str]) -> None:
        """Count one caption."""
        self.written += 1
        for remark in remarks:
            self.remarked[remark].append(escape_unprintable(name))

    def note_meanwhile(self, names: Iterable[str], *, counted: bool = True) -> None:
        """Note images whose caption somebody else wrote.

        counted: whether they were counted as written, because that shows only in the end.
        """
        for name in map(escape_unprintable, names):
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            if digest not in self.noted:
                self.noted.add(digest)
                self.meanwhile.append(name)
                self.written = max(self.written - counted, 0)

    def __add__(self, other: "CaptioningSummary") -> "CaptioningSummary":
        """Return the counts of two processes that ran at the same time."""
        total = CaptioningSummary(
            written=self.written + other.written,
            kept=self.kept + other.kept,
            seconds=max(self.seconds, other.seconds),
            left=self.left + other.left,
            adds=self.adds or other.adds,
            noted=self.noted | other.noted,
        )
        for part in (self, other):
            total.unreadable += part.unreadable
            total.meanwhile += part.meanwhile
            for remark, names in part.remarked.items():
                total.remarked[remark] += names
        return total

    def lines(self, thing: str = "image") -> list[str]:
        """Return the summary as lines: all unreadable images, and the first few names of other kinds.

        thing: what is counted, "image", or "caption" where an image gets several.
        """
        rate = (
            f" in {self.seconds:.1f} s ({self.written / self.seconds:.2f} {thing}s/s)"
            if self.written and self.seconds
            else ""
        )
        lines = [f"{count_things(self.written, thing)} {'made' if thing == 'caption' else 'captioned'}{rate}"]
        if self.kept:
            kept = (
                "added to before, by a run that was cut short"
                if self.adds
                else "kept as they were (--overwrite captions them again)"
            )
            lines[0] += f", {self.kept} {kept}"
        if self.left:
            lines[0] += f", {self.left:,} left by --limit"
        lines += describe_meanwhile(self.meanwhile)
        for remark, names in self.remarked.items():
            if names:
                lines.append(f"{names.total} {REMARKS[remark]}: {_list_first(names)}")
        return lines + self.problems()

    def problems(self) -> list[str]:
        """Return lines that name the images that could not be read: all of them, or the first thousand."""
        if not self.unreadable:
            return []
        headline = f"{count_things(self.unreadable.total, 'image')} could not be read:"
        more = [f"  … and {self.unreadable.more:,} more"] if self.unreadable.more else []
        return [headline, *(f"  {reason}" for reason in self.unreadable), *more]


def describe_meanwhile(names: FirstNames) -> list[str]:
    """Return the line about captions that somebody else wrote while the run was at work, if there are any."""
    said = f"{count_things(names.total, 'image')} got a caption from somebody else while this run was at work"
    return [f"{said}, and keep it: {_list_first(names)}"] if names else []


def _list_first(names: FirstNames) -> str:
    rest = f" and {names.more} more" if names.more else ""
    return ", ".join(names) + rest

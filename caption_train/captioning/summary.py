"""Counts what happened to every image, and lists captions worth checking. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from caption_train.metrics.output_health import REMARKS
from caption_train.system.console import count_things, escape_unprintable

MOST_NAMES = 5


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
    """

    written: int = 0
    kept: int = 0
    unreadable: list[str] = field(default_factory=list)
    remarked: dict[str, list[str]] = field(default_factory=lambda: {remark: [] for remark in REMARKS})
    seconds: float = 0.0
    meanwhile: list[str] = field(default_factory=list)
    left: int = 0
    adds: bool = False

    def count(self, name: str, remarks: Sequence[str]) -> None:
        """Count one caption."""
        self.written += 1
        for remark in remarks:
            self.remarked[remark].append(escape_unprintable(name))

    def note_meanwhile(self, names: Sequence[str]) -> None:
        """Take images out of the count whose row in `--output` somebody else wrote."""
        new = [name for name in map(escape_unprintable, names) if name not in self.meanwhile]
        self.meanwhile += new
        self.written = max(self.written - len(new), 0)

    def __add__(self, other: "CaptioningSummary") -> "CaptioningSummary":
        """Return the counts of two processes that ran at the same time."""
        return CaptioningSummary(
            self.written + other.written,
            self.kept + other.kept,
            self.unreadable + other.unreadable,
            {remark: self.remarked[remark] + other.remarked[remark] for remark in REMARKS},
            max(self.seconds, other.seconds),
            self.meanwhile + other.meanwhile,
            self.left + other.left,
            self.adds or other.adds,
        )

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
                lines.append(f"{len(names)} {REMARKS[remark]}: {_list_first(names)}")
        return lines + self.problems()

    def problems(self) -> list[str]:
        """Return lines that name all images that could not be read."""
        headline = f"{count_things(len(self.unreadable), 'image')} could not be read:"
        return [headline, *(f"  {reason}" for reason in self.unreadable)] if self.unreadable else []


def describe_meanwhile(names: Sequence[str]) -> list[str]:
    """Return the line about captions that somebody else wrote while the run was at work, if there are any."""
    count = count_things(len(names), "image")
    said = f"{count} got a caption from somebody else while this run was at work, and keep it"
    return [f"{said}: {_list_first(names)}"] if names else []


def _list_first(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + rest

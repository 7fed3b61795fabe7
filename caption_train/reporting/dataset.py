"""Makes the page of a dataset: counts, lengths, tags, and what is odd, beside its pictures.

What a page shows is said by the classes here; `write_dataset_report` makes one HTML file of it, with the same
policy and escaping as a report's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.reporting.histogram import Histogram, draw_histogram
from caption_train.reporting.page import render_page
from caption_train.reporting.report import Thumbnail
from caption_train.system.console import count_things
from caption_train.system.files import write_atomically


@dataclass(frozen=True)
class Card:
    """An image beside a finding.

    Attributes:
        name: its path in the dataset.
        note: what was measured.
        caption: its caption, if it has one.
        review_id: what the review page names it by; "" where it is not there.
        picture: its place in the report's pictures; None where there is none.
    """

    name: str
    note: str = ""
    caption: str = ""
    review_id: str = ""
    picture: int | None = None


@dataclass(frozen=True)
class Group:
    """Cards that belong together. title: what they share. count: how many there are, shown or not."""

    cards: Sequence[Card]
    count: int
    title: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        key: its address in the page.
        title: its name.
        rule: what counts, with the threshold.
        count: how many images or captions there are, in all groups.
        unit: what is counted.
        groups: what is shown of them.
        group_count: how many groups there are, shown or not.
    """

    key: str
    title: str
    rule: str
    count: int
    unit: str
    groups: Sequence[Group]
    group_count: int

    @property
    def shown(self) -> str:
        """How many are shown, where not all are."""
        shown = sum(len(group.cards) for group in self.groups)
        return f"{shown:,} shown of {self.count:,}." if shown < self.count else ""

    @property
    def amount(self) -> str:
        """The count with its unit."""
        return count_things(self.count, self.unit)


@dataclass(frozen=True)
class Count:
    """A line of the table of counts. names: some of the files. note: what becomes of them."""

    label: str
    count: int
    note: str = ""
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Distribution:
    """Lengths of captions: a histogram, and the numbers that it is read by."""

    title: str
    histogram: Histogram
    facts: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True)
class Tags:
    """Tags, the commonest first, with how many captions each is in. total: different tags, shown or not."""

    rows: Sequence[tuple[str, int]]
    total: int
    once: int
    captions: int


@dataclass(frozen=True)
class DatasetReport:
    """What a page shows.

    Attributes:
        title: heading of the page.
        facts: (what, value) lines below it.
        counts: what was found, used or not.
        distributions: of lengths and sizes.
        findings: what to look at, those with a count of 0 too.
        tags: None where captions are no lists of tags.
        pictures: small pictures, which cards name by their place.
        review_command: opens the review page of this dataset.
        review_address: where it is then.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    counts: Sequence[Count]
    distributions: Sequence[Distribution]
    findings: Sequence[Finding]
    tags: Tags | None
    pictures: Sequence[Thumbnail | None]
    review_command: str
    review_address: str


def write_dataset_report(path: Path, report: DatasetReport) -> None:
    """Write the page of a dataset, whole or not at all."""
    write_atomically(path, render_dataset_report(report))


def render_dataset_report(report: DatasetReport) -> str:
    """Return the page of a dataset as HTML."""
    data: dict[str, Any] = {"pictures": [picture and picture.address for picture in report.pictures]}
    return render_page(
        "dataset.html",
        report,
        data,
        scripts=("page.js", "dataset.js"),
        styles=("report.css", "dataset.css"),
        filters={"draw": draw_histogram, "thousands": "{:,}".format},
    )

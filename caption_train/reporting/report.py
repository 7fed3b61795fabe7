"""Says what a report shows. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Thumbnail:
    """A small picture: a `data:` address, and its size in pixels."""

    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Answer:
    """A caption of one column. remarks: keys of REMARKS. scores: metric → score of this caption alone."""

    text: str
    remarks: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """An image of the gallery. answers: one a column, None where there is none."""

    name: str
    references: Sequence[str]
    answers: Sequence[Answer | None]
    thumbnail: Thumbnail | None = None
    prompt: str = ""


@dataclass(frozen=True)
class Cell:
    """A number of the summary.

    Attributes:
        value: the score.
        interval: its 95 % interval, if there is one.
        change: against the first column: difference, its interval (low, high), and p.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    change: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A metric of the summary.

    Attributes:
        key: the metric's name in files.
        label: what people read.
        cells: one a column; none where captions are ordered by it, but it is not in the table.
        better: 1 if more is better, -1 if less is, 0 if neither.
        is_share: whether it is shown in per cent.
    """

    key: str
    label: str
    cells: Sequence[Cell]
    better: int = 0
    is_share: bool = False


@dataclass(frozen=True)
class Series:
    """A line of a chart: (x, y) points, and whether it is drawn thin, as background of another one."""

    label: str
    points: Sequence[tuple[float, float]]
    is_faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over the optimizer steps of a run."""

    title: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        title: heading of the page.
        facts: (what, value) lines below it.
        columns: names of the models, or of one model at several steps; the first is what others are
            compared with.
        rows: the summary.
        items: the gallery.
        charts: (run, its charts) pairs.
        notes: sentences below the summary.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Row] = ()
    items: Sequence[Item] = ()
    charts: Sequence[tuple[str, Sequence[Chart]]] = ()
    notes: Sequence[str] = ()


def name_model(model_id: str) -> str:
    """Return a model's name for a page that may be handed on: a folder's own name, not where it lies.

    >>> name_model("someone/model"), name_model("/home/me/models/mine")
    ('someone/model', 'mine')
    """
    return Path(model_id).name if Path(model_id).is_absolute() else model_id

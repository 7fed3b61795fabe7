"""Draws how often values occur as SVG. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MOST_BINS = 30
WIDTH, HEIGHT = 440, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 18, 34


@dataclass(frozen=True)
class Histogram:
    """Counts of values.

    Attributes:
        title: what the values are, for those who cannot see it.
        unit: what they are counted in, such as "words".
        width: how many values a bar stands for.
        first: the first value of the first bar.
        counts: of each bar.
        is_open: whether the last bar holds all values beyond it too.
        limit: a value to draw a line at.
        limit_label: what it is.
    """

    title: str
    unit: str
    width: int
    first: int
    counts: Sequence[int]
    is_open: bool = False
    limit: int | None = None
    limit_label: str = ""

    def describe_bar(self, place: int) -> str:
        """Return which values a bar stands for."""
        low = self.first + place * self.width
        if self.is_open and place == len(self.counts) - 1:
            return f"{low:,} or more"
        return f"{low:,}" if self.width == 1 else f"{low:,}–{low + self.width - 1:,}"


def make_histogram(
    values: Sequence[int], title: str, unit: str, *, limit: int | None = None, limit_label: str = ""
) -> Histogram:
    """Return the histogram of whole numbers, in bars of round width; a few far values share the last bar.

    Args:
        values: at least one number, 0 or more.
        title, unit, limit, limit_label: as `Histogram` has them; a limit is drawn where values reach it.
    """
    ordered = sorted(values)
    # One caption of ten thousand words must not squeeze all others into one bar.
    usual = ordered[min(len(ordered) - 1, math.floor(len(ordered) * 0.995))]
    low, high = ordered[0], ordered[-1]
    top = high if high <= 2 * usual + 10 else usual
    power = 10 ** max(0, math.floor(math.log10(max(1, top - low + 1))) - 2)
    width = next(
        step
        for step in (power * 10**exponent * factor for exponent in range(4) for factor in (1, 2, 5))
        if (top // step - low // step + 1) <= MOST_BINS
    )
    first = low // width * width
    counts = [0] * ((top - first) // width + 1 + (top < high))
    for value in values:
        counts[min((value - first) // width, len(counts) - 1)] += 1
    shown = limit if limit is not None and first < limit <= first + len(counts) * width else None
    return Histogram(title, unit, width, first, counts, top < high, shown, limit_label)


def draw_histogram(histogram: Histogram) -> str:
    """Return a histogram as an SVG element, its text escaped, its colours left to classes."""
    counts, most = histogram.counts, max(histogram.counts)
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    parts = []
    for tick in _ticks(most):
        y = HEIGHT - BOTTOM - tick / most * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,}</text>')
    every = math.ceil(len(counts) / 6)
    for place, count in enumerate(counts):
        x, height = LEFT + place * step, count / most * (HEIGHT - TOP - BOTTOM)
        if count:
            # What is there can be seen, even one of ten thousand.
            height = max(height, 1.5)
            label = escape(f"{histogram.describe_bar(place)} {histogram.unit}: {count:,}")
            parts.append(
                f'<rect class="bar" x="{x + step * 0.06:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
                f'width="{step * 0.88:.1f}" height="{height:.1f}"><title>{label}</title></rect>'
            )
        is_last = place == len(counts) - 1
        if (place % every == 0 and (is_last or place <= len(counts) - 1 - every / 2)) or is_last:
            low = histogram.first + place * histogram.width
            text = f"{low:,}+" if is_last and histogram.is_open else f"{low:,}"
            parts.append(f'<text x="{x + step / 2:.1f}" y="{HEIGHT - 17}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 2}" text-anchor="middle">{escape(histogram.unit)}</text>'
    )
    if histogram.limit is not None:
        x = LEFT + (histogram.limit - histogram.first) / histogram.width * step
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{TOP - 7}" text-anchor="{anchor}">{escape(histogram.limit_label)}</text>'
        )
    peak = histogram.describe_bar(max(range(len(counts)), key=counts.__getitem__))
    label = escape(f"{histogram.title}: {sum(counts):,} in all, most often {peak} {histogram.unit}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _ticks(most: int) -> list[int]:
    """Return up to five round numbers from 0 to at most `most`."""
    raw = most / 4
    power = 10 ** max(0, math.floor(math.log10(max(raw, 1))))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return list(range(0, most + 1, step))

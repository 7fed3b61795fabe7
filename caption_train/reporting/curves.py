"""Draws a run's losses, metrics and learning rate as SVG, from its log.jsonl. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from caption_train.reporting.report import Chart, Series
from caption_train.system.files import parse_json, read_regular_file

LOG_FILE = "log.jsonl"
MOST_POINTS = 400
WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34


def read_charts(folder: Path) -> list[Chart]:
    """Return the charts of the run in a folder; none where there is no log that can be read."""
    return make_charts(read_log(folder))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; none where there is no log that can be read."""
    try:
        lines = read_regular_file(folder / LOG_FILE).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return []
    return [_parse(line) for line in lines]


def make_charts(lines: Iterable[dict[str, Any]]) -> list[Chart]:
    """Return the charts of a log's lines, without those that have nothing to show."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if _is_number(step := line.get("step")):
            for name, value in line.items():
                if _is_number(value):
                    found.setdefault(name, []).append((float(step), float(value)))
    losses = found.get("loss", [])
    metrics = sorted(name for name in found if name.startswith("eval_") and name != "eval_loss")
    charts = [
        Chart(
            "Loss per token",
            [
                Series("each step", _thin(losses), is_faint=True),
                Series("running mean", _thin(_smooth(losses))),
                Series("validation", _thin(found.get("eval_loss", []))),
            ],
        ),
        Chart("Validation metrics", [Series(n.removeprefix("eval_"), _thin(found[n])) for n in metrics]),
        Chart("Learning rate", [Series("learning rate", _thin(found.get("learning_rate", [])))]),
    ]
    charts = [Chart(chart.title, [s for s in chart.series if s.points]) for chart in charts]
    return [chart for chart in charts if chart.series]


def draw_chart(chart: Chart) -> str:
    """Return a chart as an SVG element, its text escaped, its colours left to classes `line-N`."""
    points = [point for series in chart.series for point in series.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    (left, right, x_ticks), (low, high, y_ticks) = _scale(xs), _scale(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        y = place(left, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{_number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 2}" text-anchor="middle">optimizer step</text>')
    for number, series in enumerate(chart.series):
        kind = f"line line-{number}{' faint' if series.is_faint else ''}"
        placed = [place(x, y) for x, y in series.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        if len(placed) <= 40:
            parts += [
                f'<circle class="dot dot-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed
            ]
    label = escape(f"{chart.title}: " + "; ".join(map(_describe, chart.series)))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{escape(chart.title)}</title>{''.join(parts)}</svg>"
    )


def _describe(series: Series) -> str:
    (first, begin), (last, end) = series.points[0], series.points[-1]
    return f"{series.label} from {begin:.4g} at step {first:g} to {end:.4g} at step {last:g}"


def _parse(line: str) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MOST_POINTS points, each the mean of its neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the exponential running mean over a twentieth of the run, but at least ten steps."""
    keep = 1 - 1 / max(len(points) / 20, 10)
    smoothed, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Return bounds around values, never equal, and round numbers between them."""
    low, high = min(values), max(values)
    if high - low <= abs(high) * 1e-9:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return low, high, [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"

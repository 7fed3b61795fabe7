"""Draw memory.png from memory.json and flora.json: python benchmarks/plot.py"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import MODELS
from benchmarks.memory import ROWS, count

HERE = Path(__file__).parent
PARTS = {"weights": "tab:blue", "gradients": "tab:orange", "state": "tab:green", "rest": "lightgray"}
FULL_STATE = "AdamW"


def draw_peaks(axes, rows: dict[str, dict], title: str) -> None:
    """One bar a row, as long as the measured peak, of which the counted parts are coloured."""
    rows = {name: rows[name] for name in ROWS if "peak" in rows.get(name, {})}
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for part, colour in PARTS.items():
        counted = [sum(rows[name].get(p, 0) for p in ("weights", "gradients", "state")) for name in names]
        sizes = [
            max(rows[name]["peak"] - total, 0) if part == "rest" else rows[name][part]
            for name, total in zip(names, counted, strict=True)
        ]
        # Activations are gone when the last gradients are there, so the parts can be more than the peak.
        widths = [size / 1e9 for size in sizes]
        axes.barh(names, widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, name in enumerate(names):
        axes.text(left[y], y, f" {rows[name]['peak'] / 1e9:.1f}", va="center", fontsize=7)
    axes.set(title=title, xlabel="GB, at most at once")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.12)


def draw_quality(axes, results: dict[str, dict]) -> None:
    """Validation loss against the bytes of gradients and optimizer state, in units of AdamW's."""
    mean = {
        row: {
            key: sum(seed[key] for seed in seeds.values()) / len(seeds) for key in next(iter(seeds.values()))
        }
        for row, seeds in results.items()
    }
    whole = mean[FULL_STATE]
    series = {"momentum": [], "gradients": [], "both": []}
    for row, value in mean.items():
        share = (value["state"] + value["gradients"]) / (whole["state"] + whole["gradients"])
        kind = next((kind for kind in series if f"Flora, {kind}" in row), None)
        if kind is None:
            axes.scatter(share, value["loss"], marker="x", label=row.partition(" (")[0])
        else:
            series[kind].append((share, value["loss"], row.rpartition(" ")[2]))
    for kind, points in series.items():
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            marker="o",
            ms=4,
            label=f"Flora, {kind} compressed",
        )
        for x, y, rank in points[:-1]:
            axes.annotate(rank, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(
        title="Tiny Florence-2, every weight trained; numbers are ranks",
        xlabel="gradients and state, in units of AdamW's",
        ylabel="held-out loss per token",
    )
    axes.legend(fontsize=7)


def draw_ranks(axes) -> None:
    """Bytes of Flora's state and of compressed gradients against the rank, in units of AdamW's."""
    for name in MODELS:
        rows = count(name)
        ranks = [int(row.split()[1]) for row in rows if row.startswith("Flora")]
        for index, style in enumerate(("-", ":")):
            shares = [100 * rows[f"Flora {rank}"][index] for rank in ranks]
            label = f"{name}, {('state', 'gradients')[index]}"
            axes.plot(ranks, shares, style, marker="o", ms=3, label=label, color=f"C{MODELS.index(name)}")
    axes.set(title="Every weight trained, true size", xlabel="rank", ylabel="% of AdamW's", xscale="log")
    axes.legend(fontsize=7)


def main() -> None:
    results = json.loads((HERE / "memory.json").read_text())
    figure = Figure(figsize=(13, 12), layout="constrained")
    grid = figure.subplots(3, 2)
    for axes, (name, rows) in zip(grid.flat, results.items(), strict=False):
        draw_peaks(axes, rows, name)
    grid[0][0].legend(fontsize=7, loc="center right")
    draw_quality(grid[2][0], json.loads((HERE / "flora.json").read_text()))
    draw_ranks(grid[2][1])
    figure.savefig(HERE / "memory.png", dpi=90)


if __name__ == "__main__":
    main()

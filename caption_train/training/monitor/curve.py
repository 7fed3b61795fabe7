"""Draws a run's losses and learning rate."""

from pathlib import Path
from typing import TYPE_CHECKING

from caption_train.system.console import print_line
from caption_train.system.files import open_atomically, parse_json
from caption_train.training.monitor.log import LOG_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_FILE = "training_curve.png"


def draw_curve(output_dir: Path) -> None:
    """Draw `training_curve.png` from the log: losses, the best validation and the learning rate.

    Without matplotlib, which nothing else in training needs, a line says that it is not drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print_line(f"{CURVE_FILE} is not drawn: matplotlib is not installed")
        return
    lines = [parse_json(line) for line in (output_dir / LOG_FILE).read_text("utf-8").splitlines()]
    taken = [line for line in lines if line.get("loss") is not None]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    losses, rates = figure.subplots(2, height_ratios=[4, 1], sharex=True)
    steps = [line["step"] for line in taken]
    losses.plot(
        steps, [line["loss"] for line in taken], color="tab:blue", alpha=0.25, lw=1, label="each step"
    )
    losses.plot(
        steps, _smooth([line["loss"] for line in taken]), color="tab:blue", lw=2, label="running mean"
    )
    _draw_validation(losses, [line for line in lines if line.get("eval_loss") is not None])
    losses.set(ylabel="loss per token", title=output_dir.resolve().name)
    losses.legend(fontsize="small")
    rates.plot(steps, [line["learning_rate"] for line in taken], color="tab:gray", lw=1.5)
    rates.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with open_atomically(output_dir / CURVE_FILE, "wb") as file:
        figure.savefig(file, dpi=120, format="png")


def _draw_validation(axes: "Axes", lines: list[dict]) -> None:
    if not lines:
        return
    steps, values = [line["step"] for line in lines], [line["eval_loss"] for line in lines]
    axes.plot(steps, values, color="tab:orange", lw=2, marker="o", ms=4, label="validation")
    best = min(range(len(values)), key=values.__getitem__)
    axes.plot(
        steps[best],
        values[best],
        "*",
        color="tab:red",
        ms=13,
        label=f"lowest: {values[best]:.4g}, step {steps[best]}",
    )


def _smooth(values: list[float]) -> list[float]:
    """Return the exponential running mean over a twentieth of the run, but at least ten steps."""
    keep = 1 - 1 / max(len(values) / 20, 10)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed

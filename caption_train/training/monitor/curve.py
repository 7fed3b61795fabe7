"""Draws a run's losses and learning rate."""

from pathlib import Path
from typing import TYPE_CHECKING

from caption_train.system.console import print_line
from caption_train.system.files import open_atomically, parse_json
from caption_train.training.monitor.log import LOG_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_FILE = "training_curve.png"


def draw_curve(output_dir: Path, best_step: int | None = None, best_by: str = "loss") -> None:
    """Draw `training_curve.png` from the log: losses, metrics, the best checkpoint and the learning rate.

    Without matplotlib, which nothing else in training needs, a line says that it is not drawn.

    Args:
        output_dir: the folder of the log.
        best_step: the optimizer step of the checkpoint `best`, None without validation.
        best_by: the metric that ranks checkpoints.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print_line(f"{CURVE_FILE} is not drawn: matplotlib is not installed")
        return
    lines = [parse_json(line) for line in (output_dir / LOG_FILE).read_text("utf-8").splitlines()]
    metrics = sorted({name for line in lines for name in line if name.startswith("eval_")} - {"eval_loss"})
    heights = [4, 2, 1] if metrics else [4, 1]
    figure = Figure(figsize=(8, 5.5 + 2 * bool(metrics)), layout="constrained")
    losses, *between, rates = figure.subplots(len(heights), height_ratios=heights, sharex=True)
    _draw_losses(losses, lines)
    losses.set(ylabel="loss per token", title=output_dir.resolve().name)
    for axes in between:
        _draw_metrics(axes, lines, metrics)
    taken = [line for line in lines if line.get("loss") is not None]
    rates.plot(
        [line["step"] for line in taken], [line["learning_rate"] for line in taken], color="tab:gray", lw=1.5
    )
    rates.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, *between, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if best_step is not None:
            label = f"best by {best_by}: step {best_step}" if axes is losses else None
            axes.axvline(best_step, color="tab:red", ls="--", lw=1.2, label=label)
    for axes in (losses, *between):
        axes.legend(fontsize="small")
    with open_atomically(output_dir / CURVE_FILE, "wb") as file:
        figure.savefig(file, dpi=120, format="png")


def _draw_losses(axes: "Axes", lines: list[dict]) -> None:
    taken = [line for line in lines if line.get("loss") is not None]
    steps, values = [line["step"] for line in taken], [line["loss"] for line in taken]
    axes.plot(steps, values, color="tab:blue", alpha=0.25, lw=1, label="each step")
    axes.plot(steps, _smooth(values), color="tab:blue", lw=2, label="running mean")
    _draw_points(axes, lines, "eval_loss", "validation", color="tab:orange")


def _draw_metrics(axes: "Axes", lines: list[dict], names: list[str]) -> None:
    for name in names:
        _draw_points(axes, lines, name, name.removeprefix("eval_"))
    axes.set(ylabel="validation")


def _draw_points(axes: "Axes", lines: list[dict], name: str, label: str, **style: str) -> None:
    measured = [line for line in lines if line.get(name) is not None]
    if measured:
        steps, values = [line["step"] for line in measured], [line[name] for line in measured]
        axes.plot(steps, values, lw=2, marker="o", ms=4, label=label, **style)


def _smooth(values: list[float]) -> list[float]:
    """Return the exponential running mean over a twentieth of the run, but at least ten steps."""
    keep = 1 - 1 / max(len(values) / 20, 10)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed

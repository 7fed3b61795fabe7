"""A run's losses as a picture."""

import json
import sys
from pathlib import Path

from caption_train.files import open_atomically
from caption_train.tracking import LOG_FILE

CURVE_FILE = "training_curve.png"


def draw_curve(output_dir: Path) -> None:
    """Draw `training_curve.png` from the log: loss, its running mean, validation loss and learning rate.

    Without matplotlib, which nothing else needs, it says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{CURVE_FILE} is not drawn: matplotlib is not installed", file=sys.stderr)
        return
    lines = [json.loads(line) for line in (output_dir / LOG_FILE).read_text("utf-8").splitlines()]
    taken = [line for line in lines if line.get("loss") is not None]
    validated = [line for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    steps = [line["step"] for line in taken]
    losses.plot(steps, [line["loss"] for line in taken], color="tab:blue", alpha=0.3, label="loss")
    losses.plot(
        steps, _smooth([line["loss"] for line in taken]), color="tab:blue", label="loss, running mean"
    )
    if validated:
        losses.plot(
            [line["step"] for line in validated],
            [line["eval_loss"] for line in validated],
            color="tab:orange",
            marker="o",
            label="validation loss",
        )
    losses.set(xlabel="step", ylabel="loss per token")
    rates = losses.twinx()
    rates.plot(
        steps, [line["learning_rate"] for line in taken], color="tab:gray", lw=0.8, label="learning rate"
    )
    rates.set_ylabel("learning rate")
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=losses.transAxes, fontsize="small")
    with open_atomically(output_dir / CURVE_FILE, "wb") as file:
        figure.savefig(file, dpi=120, format="png")


def _smooth(values: list[float]) -> list[float]:
    """Return the exponential running mean over about a twentieth of the run, corrected for its start."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed

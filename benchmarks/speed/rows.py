"""The rows of the speed benchmark that have sides: training, training with a frozen tower, captioning.

Sides take turns, and in every round another one begins. So what else the machine does meets all of them, and
the ratio is the median of the rounds' own ratios.
"""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.bases import make_adapter, make_base
from benchmarks.speed.photos import write_photos
from benchmarks.speed.sides import Side

OURS = "ours"
TRAINING = (OURS, "Trainer", "accelerate loop")
CAPTIONING = (OURS, "batched, adapter beside", "batched, no adapter", "one at a time", "pipeline")
MEDIANS = ("seconds", "cpu_seconds", "data_seconds")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what it is called in the results.
        kind: `training` or `captioning`.
        base: see `make_base`.
        sides: the first is ours, and the others are compared with it.
        images: of a step or a round, each side.
        photos: how many photo files there are.
        megapixels: of each photo.
        settings: added to what every side is told.
        flags: side → flags of our training; such a side is ours too.
        warm_up: rounds that do not count.
    """

    name: str
    kind: str
    base: str
    sides: tuple[str, ...]
    images: int
    photos: int
    megapixels: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    warm_up: int = 1


@dataclass(frozen=True)
class Effort:
    """How long a row is measured: rounds are added until `seconds` are over, within `least` and `most`."""

    seconds: float
    least: int = 3
    most: int = 30


def make_training_row(
    base: str, batch_size: int, precision: str, photos: int = 8, megapixels: int = 1
) -> Row:
    """Return the row of a training step with every part trained."""
    settings = {"batch_size": batch_size, "precision": precision}
    name = f"training, {base}, {precision.replace('no', 'float32')}, batch {batch_size}"
    name += f", {megapixels} MP" if megapixels > 1 else ""
    return Row(name, "training", base, TRAINING, batch_size, photos, megapixels, settings)


def make_frozen_row(base: str, batch_size: int, precision: str) -> Row:
    """Return the row of the frozen tower: its features kept, from the second epoch on, against computed."""
    name = f"frozen tower, {base}, {precision.replace('no', 'float32')}, batch {batch_size}"
    return Row(
        name,
        "training",
        base,
        (OURS, "features computed"),
        batch_size,
        2 * batch_size,
        settings={"batch_size": batch_size, "precision": precision},
        flags={
            OURS: {"cache_features": True},
            "features computed": {"train_parts": ["projector", "language"]},
        },
        warm_up=3,  # the first epoch's two steps fill the store
    )


def make_captioning_row(base: str, photos: int, dtype: str = "float32", megapixels: int = 1) -> Row:
    """Return the row of captioning a folder with an adapter: greedy, 20 tokens each, batch 4."""
    settings = {"batch_size": 4, "dtype": dtype, "tokens": 20}
    name = f"captioning, {base}, {dtype}, {megapixels} MP"
    return Row(name, "captioning", base, CAPTIONING, photos, photos, megapixels, settings)


def measure_row(row: Row, folder: Path, device: str, effort: Effort) -> dict[str, Any]:
    """Measure a row.

    Args:
        row: what to compare.
        folder: where bases and photos lie or are made.
        device: `cpu` or `cuda`.
        effort: how long.

    Returns:
        `sides`, each with its medians, `ratios` (how many times as long others take), and the limit.
    """
    load = os.getloadavg()[0]
    scratch = Path(tempfile.mkdtemp(prefix="speed-"))
    sides: dict[str, Side] = {}
    try:
        specs = make_specs(row, folder, device, scratch)
        sides = {name: Side(spec) for name, spec in specs.items()}
        rounds, failed, counted = run_rounds(row, sides, device, effort)
    finally:
        for side in sides.values():
            side.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return summarize(row, rounds, failed) | counted | {"load": round(load, 2)}


def make_specs(row: Row, folder: Path, device: str, scratch: Path) -> dict[str, dict[str, Any]]:
    """Make what the row needs, and return what each side is told."""
    family, base = row.base.partition("-")[0], make_base(row.base, folder)
    shared = {"row": row.kind, "family": family, "base": str(base), "device": device, **row.settings}
    shared |= {"data": str(write_photos(folder, row.photos, row.megapixels)), "cache": str(scratch)}
    if row.kind == "captioning":
        shared["adapter"] = str(make_adapter(family, base, folder / f"{row.base}-adapter"))
    return {
        name: shared | ({"side": OURS, "flags": row.flags[name]} if row.flags else {"side": name})
        for name in row.sides
    }


def run_rounds(
    row: Row, sides: dict[str, Side], device: str, effort: Effort
) -> tuple[list[dict[str, dict]], dict[str, str], dict[str, Any]]:
    """Let the sides take turns.

    Returns:
        The rounds that count, side → answer; the sides that do not run, and why; FLOPs of ours and the peak
        of a matrix product, measured between the rounds.
    """
    failed: dict[str, str] = {}
    for name, side in list(sides.items()):
        try:
            side.answer()
            for _ in range(row.warm_up):
                side.tell("go")
        except RuntimeError as error:
            if name == OURS:
                raise
            failed[name] = str(error)[:200]
    names, rounds, peaks = [name for name in sides if name not in failed], [], []
    began = time.perf_counter()
    for number in count():
        if (number >= effort.least and time.perf_counter() - began > effort.seconds) or number >= effort.most:
            break
        turn = number % len(names)
        rounds.append({name: sides[name].tell("go") for name in names[turn:] + names[:turn]})
        peaks.append(sides[OURS].tell("peak")["flops_per_second"])
    # Ours may replay recorded steps, where nothing is to be counted; a plain loop does the same products.
    counting = sides[names[1] if row.kind == "captioning" and len(names) > 1 else OURS]
    counted = {"peak_flops_per_second": median(peaks), "flops": counting.tell("count")["flops"]}
    if device == "cuda":
        counted["kernels"] = sides[OURS].tell("kernels")["kernels"]
    seconds = median(r[OURS]["seconds"] for r in rounds)
    counted["share_of_peak"] = round(counted["flops"] / seconds / counted["peak_flops_per_second"], 3)
    return rounds, failed, counted


def summarize(row: Row, rounds: list[dict[str, dict]], failed: dict[str, str]) -> dict[str, Any]:
    """Return the medians of each side, and the ratios of the others to ours."""
    sides: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        answers = [r[name] for r in rounds]
        medians = {key: round(median(a[key] for a in answers), 4) for key in MEDIANS}
        sides[name] = medians | {
            "images_per_second": round(row.images / median(a["seconds"] for a in answers), 3),
            "peak_bytes": answers[-1]["peak_bytes"],
        }
        if name != OURS:
            sides[name] |= compare(rounds, name)
    return {
        "rounds": len(rounds),
        "sides": sides | {name: {"error": reason} for name, reason in failed.items()},
        "ratios": {name: divide(rounds, name, "seconds") for name in rounds[0] if name != OURS},
        "cpu_ratios": {name: divide(rounds, name, "cpu_seconds") for name in rounds[0] if name != OURS},
    }


def divide(rounds: list[dict[str, dict]], name: str, key: str) -> float:
    """Return the median of the rounds' ratios: this side's time in units of ours."""
    return round(median(r[name][key] / r[OURS][key] for r in rounds), 3)


def compare(rounds: list[dict[str, dict]], name: str) -> dict[str, Any]:
    """Return how far a side's losses, or how many of its images' tokens, differ from ours."""
    if "loss" in rounds[0][OURS]:
        largest = max(abs(r[name]["loss"] - r[OURS]["loss"]) for r in rounds)
        return {"largest_loss_difference": float(f"{largest:.2g}")}
    if name == "batched, no adapter":
        return {}
    pairs = list(zip(rounds[0][OURS]["tokens"], rounds[0][name]["tokens"], strict=True))
    # Ours leaves out what a decoder starts with.
    return {"images_with_other_tokens": sum(a[-len(b) :] != b[-len(a) :] for a, b in pairs)}

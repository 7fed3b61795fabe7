"""Runs `--plan`: prints the memory that a run would need, and flags with which it fits `--memory_budget`."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from caption_train.adapters.record import Base
from caption_train.config.training import TrainOptions
from caption_train.config.values import parse_bytes
from caption_train.data.images import ImageError, open_image, read_size
from caption_train.data.pairs import Pair
from caption_train.errors import CaptionTrainError
from caption_train.families.base import Family
from caption_train.shards.dataset import read_any_dataset
from caption_train.system.console import GIB, print_result
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.memory import peak_memory, resident_memory
from caption_train.training.distributed.accelerator import make_accelerator, resolve_precision
from caption_train.training.memory.activations import (
    Activations,
    cast_frozen,
    measure_activations,
    standing_for_packed,
)
from caption_train.training.memory.estimate import HALF, MemoryEstimate, Planner, find_kind, find_quantized
from caption_train.training.memory.shapes import NEEDS_DATA, ShapesOnly
from caption_train.training.model import load_trainable, resolve_options

ROWS = {
    "libraries": "Python and its libraries",
    "loading": "while the model is read",
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "activations": "activations",
    "kept": "freed, kept by the heap",
    "stepping": "during the optimizer step",
}


def plan_training(options: TrainOptions, family: Family) -> int:
    """Print the estimate for these options; return the exit code, 1 if nothing fits the budget."""
    planner, options = make_planner(options, family)
    plan = planner.plan(options)
    _print(f"memory on {planner.device}, batch size {options.batch_size}:")
    print_plan(plan)
    if options.memory_budget is None:
        return 0
    budget = parse_bytes(options.memory_budget)
    if plan.fits(budget):
        _print(f"fits in {options.memory_budget}, a fifth to spare")
        return 0
    _, smaller, flags = planner.find_cheapest(options, budget)
    verdict = (
        "fits, also if it takes a fifth more, with" if smaller.fits(budget) else "does not fit, not even with"
    )
    _print(f"{options.memory_budget}: {verdict} {' '.join(flags)}:")
    print_plan(smaller)
    return 0 if smaller.fits(budget) else 1


def print_plan(plan: MemoryEstimate) -> None:
    """Print the parts of an estimate that are not zero, and the peak."""
    for f in fields(plan):
        if (
            f.name in ROWS
            and (size := getattr(plan, f.name))
            and (f.name != "loading" or size > plan.weights)
        ):
            _print(f"  {ROWS[f.name]:<26}{size / GIB:8.2f} GiB")
    _print(f"  {'at most, at once':<26}{plan.peak / GIB:8.2f} GiB")


def _print(line: str) -> None:
    if PartialState().is_main_process:
        print_result(line)


def make_planner(options: TrainOptions, family: Family) -> tuple[Planner, TrainOptions]:
    """Measure one image's activations; return the options with the precision resolved.

    The weights are read where the family says so, or where the forward depends on what they hold.
    """
    options, base = resolve_options(resolve_precision(options)[0], family)
    accelerator = make_accelerator(options)
    options = replace(options, mixed_precision=accelerator.mixed_precision)
    pairs = [
        pair
        for folder, weight in options.datasets
        for pair in read_any_dataset(
            folder,
            caption_extensions=options.caption_extension,
            follow_symlinks=options.follow_symlinks,
        )
        * weight
    ]
    if family.plans_without_weights:
        with suppress(*NEEDS_DATA):
            return _plan_model(options, family, base, accelerator, pairs, is_empty=True), options
        _print("--plan: what this model computes depends on its weights, so they are read")
    return _plan_model(options, family, base, accelerator, pairs, is_empty=False), options


def _plan_model(
    options: TrainOptions,
    family: Family,
    base: Base,
    accelerator: Accelerator,
    pairs: Sequence[Pair],
    *,
    is_empty: bool,
) -> Planner:
    plain = replace(
        options,
        quantize=None,
        quantize_parts=[],
        gradient_checkpointing=False,
        activation_checkpointing=False,
        # What a LoRA starts from changes no size, and needs the base's weights.
        **({"init_lora_weights": None, "init_adapter": None} if is_empty else {}),
    )
    before = resident_memory()
    model, processor = load_trainable(plain, family, base.facts, accelerator, is_empty=is_empty)
    family.set_up(processor, base.model_id, base.settings, [base.prompt])
    collate_fn = family.make_collator(processor, prompt=base.prompt, max_length=options.max_length)
    batch = collate_fn([_make_worst(pairs)])
    on_cpu = accelerator.device.type == "cpu"
    held = sum(p.nbytes for p in model.parameters())
    shapes = nullcontext()
    if is_empty:
        shapes = ShapesOnly()
        shapes.hollow(model)
        file = sum(path.stat().st_size for path in Path(base.model_id).glob("*.safetensors")) or held
    else:
        # Zero if the weights are mapped from the file: their pages are read only when they are first used.
        copied = peak_memory(torch.device("cpu")) - before - held
        file = copied if copied > held / 4 else held
    with shapes:
        measured = _measure(model, base.facts.parts, batch, options)
    return Planner(
        model,
        base.facts.parts,
        measured,
        libraries=before if on_cpu else 0,
        file=file if on_cpu else 0,
        device=accelerator.device.type,
        processes=accelerator.num_processes,
    )


def _measure(
    model: torch.nn.Module, parts: Mapping[str, str], batch: dict[str, Any], options: TrainOptions
) -> dict[str, Activations]:
    """Return the activations of one image for each precision that may be planned.

    Without a budget that is the one asked for: no other flags are tried.
    """
    is_lora = options.train_method == "lora"
    kinds = {"no", "bf16", "quantized"} if options.memory_budget else {find_kind(options)}
    model.train()
    measured = {}
    if "no" in kinds and options.mixed_precision not in HALF:
        measured["no"] = measure_activations(
            model, move_batch(batch, torch.device("cpu"), model_dtype(model))
        )
    if "bf16" in kinds:
        with cast_frozen(model, torch.bfloat16 if is_lora else torch.float32):
            measured["bf16"] = _measure_half(model, batch)
    if "quantized" in kinds and is_lora:
        packed = find_quantized(model, parts, replace(options, quantize=options.quantize or "4bit"))
        with standing_for_packed(model, packed):
            measured["quantized"] = _measure_half(model, batch)
    return measured


def _measure_half(model: torch.nn.Module, batch: dict[str, Any]) -> Activations:
    with torch.autocast("cpu", torch.bfloat16):
        return measure_activations(model, move_batch(batch, torch.device("cpu"), model_dtype(model)))


def _make_worst(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return what needs the most memory: the longest caption on the largest image that can be read."""
    longest = max(pairs, key=lambda pair: len(pair.caption))
    for pair in sorted(pairs, key=lambda pair: read_size(pair.image), reverse=True):
        with suppress(ImageError):
            return {"image": open_image(pair.image)} | longest.texts
    raise CaptionTrainError("none of the images can be read")

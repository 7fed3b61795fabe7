"""Accelerator, optimizer and learning-rate schedule, made to go together."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from caption_train import sharding, zero
from caption_train.combinations import check
from caption_train.counting import find_embeddings
from caption_train.errors import UsageError
from caption_train.launcher import asks_for
from caption_train.options import TrainOptions
from caption_train.processes import is_one_of_several

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
KINDS = ("DEEPSPEED", "MEGATRON_LM", "FSDP")
"""Ways to share the work that the environment may ask for; plain data parallelism asks for nothing."""
FLORA_BETA1 = 0.9
"""Momentum of Flora, the paper's. Upstream's default is none, with which `rank` would do nothing."""


def make_accelerator(options: TrainOptions) -> Accelerator:
    """Make the Accelerator, a CompressedAccelerator under `--accumulation_compression`.

    Its `backward` never divides: the loop weighs each micro-batch by its tokens, so accelerate's own count of
    accumulation steps stays 1. Raises UsageError where flags and what accelerate resolved do not go together.
    """
    _forget_last_run()
    _choose_device(options.device)
    _refuse(_check_launch(options))
    settings = {
        "cpu": options.device == "cpu" or _share_cpus(),
        "mixed_precision": options.mixed_precision,
        "log_with": options.log_with,
        "project_dir": options.output_dir,
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
    }
    if options.accumulation_compression:
        from caption_train.flora import CompressedAccelerator

        accelerator = CompressedAccelerator(options.accumulation_rank, **settings)
    else:
        accelerator = (zero.ZeroAccelerator if asks_for("DEEPSPEED") else Accelerator)(**settings)
    problems = check(
        options,
        device=accelerator.device.type,
        precision=accelerator.mixed_precision,
        distributed=sharding.describe_launch(accelerator),
    )
    _refuse(problems)
    return accelerator


def make_optimizer(options: TrainOptions, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of the model's trainable parameters.

    Flora's `scale_parameter` is off: it multiplies the rate by the weight's size, which for a new `lora_B`
    is zero; `--learning_rate` then means about what it means to AdamW.
    """
    groups = group_parameters(options, model)
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer_name == "AdamW":
        # One kernel for a whole weight: no temporaries as large as it, and on a CPU six times as fast.
        fused = PartialState().device.type in FUSED_DEVICES
        return torch.optim.AdamW(groups, fused=fused or None, **settings)
    if options.optimizer_name == "Flora":
        from caption_train.flora import Flora

        return Flora(groups, beta1=FLORA_BETA1, scale_parameter=False, **settings)
    import bitsandbytes

    return getattr(bitsandbytes.optim, options.optimizer_name)(groups, **settings)


def group_parameters(options: TrainOptions, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters as groups of one learning rate and, for Flora, one rank.

    A `lora_B` learns `--lora_plus_ratio` times as fast (LoRA+, arXiv 2402.12354). An embedding's momentum is
    left whole, as in Flora's paper.
    """
    is_flora = options.optimizer_name == "Flora"
    embeddings = find_embeddings(model)
    groups: dict[tuple, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_fast = options.lora_plus_ratio is not None and "lora_B" in name
            rate = options.learning_rate * (options.lora_plus_ratio if is_fast else 1)
            rank = options.optimizer_rank if is_flora and p not in embeddings else None
            groups.setdefault((rate, rank), []).append(p)
    return [
        {"params": parameters, "lr": rate, **({"rank": rank} if is_flora else {})}
        for (rate, rank), parameters in groups.items()
    ]


def make_lr_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> LRScheduler:
    """Make the schedule over `total_steps` optimizer steps.

    The rate rises for `--warmup_steps`; OneCycle without them rises for torch's 30 % of the steps.
    """
    if options.scheduler == "OneCycle":
        # torch ends the rise at step `share * total_steps - 1` and divides by what is left after it.
        total_steps = max(total_steps, options.warmup_steps + 2)
        share = (options.warmup_steps + 1) / total_steps if options.warmup_steps else 0.3
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps, pct_start=share, cycle_momentum=False)
    from transformers import get_scheduler

    name = "constant_with_warmup" if options.scheduler == "constant" else options.scheduler
    return get_scheduler(name, optimizer, options.warmup_steps, total_steps)


@contextmanager
def accumulate(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Run one micro-batch; only the `last` of an optimizer step lets gradients cross between processes."""
    accelerator.sync_gradients = last
    with nullcontext() if last else hold_gradients(accelerator, model):
        yield


def hold_gradients(accelerator: Accelerator, model: torch.nn.Module) -> AbstractContextManager:
    """Let no gradient cross between processes; a sharded model's do, or each would hold whole ones."""
    return nullcontext() if isinstance(model, FSDPModule) else accelerator.no_sync(model)


def _forget_last_run() -> None:
    """Let one process make one Accelerator after another: accelerate keeps its settings in shared state."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not distributed)
    GradientState._reset_state()


def _check_launch(options: TrainOptions) -> list[str]:
    """Check what the launcher left in the environment: over some of it accelerate ends in a traceback."""
    asked = [kind for kind in KINDS if asks_for(kind)]
    problems = check(
        options,
        device=None if torch.accelerator.is_available() else "cpu",
        precision=options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"),
        distributed=asked[0] if asked else None,
    )
    for kind, room in (("FSDP", sharding), ("DEEPSPEED", zero)):
        problems += room.find_unsupported() if kind in asked else []
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError("; ".join(problems))


def _share_cpus() -> bool:
    """Tell several processes without a GPU, of which accelerate would make as many runs, each on its own."""
    return is_one_of_several() and not torch.accelerator.is_available()


def _choose_device(device: str | None) -> None:
    """Have accelerate use `--device`; in a launch of several processes each keeps the one it is given."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device} cannot be used on this machine: {reason}") from None
    if device != "cpu" and "LOCAL_RANK" not in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)

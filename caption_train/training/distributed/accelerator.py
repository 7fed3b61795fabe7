"""Accelerator, optimizer and learning-rate schedule, made to go together."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch.distributed.fsdp import FSDPModule

from caption_train.config.compatibility import check
from caption_train.config.training import TrainOptions
from caption_train.errors import UsageError
from caption_train.system.devices import open_device
from caption_train.system.launcher import asks_for
from caption_train.system.processes import is_one_of_several
from caption_train.training.distributed import deepspeed, fsdp

KINDS = ("DEEPSPEED", "MEGATRON_LM", "FSDP")
"""Ways to share the work that the environment may ask for; plain data parallelism asks for nothing."""


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
        from caption_train.training.optim.flora import CompressedAccelerator

        accelerator = CompressedAccelerator(options.accumulation_rank, **settings)
    else:
        accelerator = (deepspeed.ZeroAccelerator if asks_for("DEEPSPEED") else Accelerator)(**settings)
    problems = check(
        options,
        device=accelerator.device.type,
        precision=accelerator.mixed_precision,
        distributed=fsdp.parallelism(accelerator),
    )
    _refuse(problems)
    return accelerator


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
    for kind, room in (("FSDP", fsdp), ("DEEPSPEED", deepspeed)):
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
    open_device(device)
    if device != "cpu" and "LOCAL_RANK" not in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)

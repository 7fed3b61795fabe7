"""Makes the Accelerator, and controls when gradients are exchanged between processes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed.fsdp import FSDPModule

from caption_train.config.compatibility import check
from caption_train.config.training import TrainOptions
from caption_train.errors import UsageError
from caption_train.system.devices import choose_device, choose_precision, open_device, use_tensor_cores
from caption_train.system.launcher import asks_for
from caption_train.system.processes import is_one_of_several
from caption_train.training.distributed import deepspeed, fsdp

KINDS = ("DEEPSPEED", "MEGATRON_LM", "FSDP")
"""Kinds of parallelism that the environment may ask for; plain data parallelism is the default."""


def resolve_precision(options: TrainOptions) -> tuple[TrainOptions, list[str]]:
    """Return the options with what `--mixed_precision auto` means here, and a line that says it."""
    if options.mixed_precision != "auto":
        return options, []
    processes = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(options.device, local_rank=local_rank, processes=processes)
    precision, reason = choose_precision(device)
    return replace(options, mixed_precision=precision), [f"--mixed_precision auto: {precision}, {reason}"]


def make_accelerator(options: TrainOptions) -> Accelerator:
    """Make the Accelerator; with `--accumulation_compression` it is a CompressedAccelerator.

    The loop weighs each micro-batch by its tokens. So `backward` must not divide by the accumulation steps,
    which are 1 for accelerate.

    Raises:
        UsageError: the options do not fit what accelerate read from its own configuration.
    """
    _forget_last_run()
    _choose_device(options.device)
    _refuse(_check_launch(options))
    settings = {
        "cpu": options.device == "cpu" or _share_cpus(),
        "mixed_precision": options.mixed_precision,
        "log_with": options.log_with,
        "project_dir": options.output_dir,
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(seconds=options.rank_timeout))],
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
    use_tensor_cores(accelerator.device)
    return accelerator


@contextmanager
def accumulate(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Run one micro-batch inside the `with` block; gradients are exchanged only for the last one of a step.

    Args:
        accelerator: the accelerator.
        model: the prepared model.
        last: whether this is the last micro-batch of the optimizer step.
    """
    accelerator.sync_gradients = last
    with nullcontext() if last else hold_gradients(accelerator, model):
        yield


def hold_gradients(accelerator: Accelerator, model: torch.nn.Module) -> AbstractContextManager:
    """Exchange no gradients inside the `with` block; a sharded model does, or it would hold full ones."""
    return nullcontext() if isinstance(model, FSDPModule) else accelerator.no_sync(model)


def _forget_last_run() -> None:
    """Reset accelerate's shared state, so that one process can make several Accelerators in turn."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not distributed)
    GradientState._reset_state()


def _check_launch(options: TrainOptions) -> list[str]:
    """Check what the launcher set in the environment; some of it makes accelerate raise a traceback."""
    asked = [kind for kind in KINDS if asks_for(kind)]
    problems = check(
        options,
        device=None if torch.accelerator.is_available() else "cpu",
        precision=options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"),
        distributed=asked[0] if asked else None,
    )
    for kind, module in (("FSDP", fsdp), ("DEEPSPEED", deepspeed)):
        problems += module.find_unsupported() if kind in asked else []
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError("; ".join(problems))


def _share_cpus() -> bool:
    """Tell whether there are several processes without a GPU; accelerate would run each on its own."""
    return is_one_of_several() and not torch.accelerator.is_available()


def _choose_device(device: str | None) -> None:
    """Make accelerate use `--device`; with several processes, each keeps the device it is given."""
    if device is None:
        return
    open_device(device)
    if device != "cpu" and "LOCAL_RANK" not in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)

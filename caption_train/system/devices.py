"""Chooses the device, and moves batches to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError

if TYPE_CHECKING:
    import torch


def open_device(name: str) -> torch.device:
    """Return the device that `--device` names; UsageError where this machine cannot use it."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used on this machine: {reason}") from None
    return device


def choose_device(name: str | None, *, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Return the device called `name`, or the best there is for this process; UsageError if there is none."""
    import torch

    if name is not None:
        device = open_device(name)
        if device.type != "cuda" or device.index is not None or processes == 1:
            return device
    elif not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def move_batch(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the batch on `device`, pixels and other floating-point tensors in the model's `dtype`.

    What is no tensor stays as it is.
    """

    import torch

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype that `model` takes its pixels in: its first floating-point weight's."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

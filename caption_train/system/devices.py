"""Chooses the device, and moves batches to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError

if TYPE_CHECKING:
    import torch


def open_device(name: str) -> torch.device:
    """Return the device that `--device` names; raise UsageError if this machine cannot use it."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used on this machine: {reason}") from None
    return device


def choose_device(name: str | None, *, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Return the device for this process.

    Args:
        name: the value of `--device`; None means the best device of this machine.
        local_rank: this process's number on its machine, which chooses among several GPUs.
        processes: how many processes there are in all.

    Raises:
        UsageError: this machine cannot use the device `name`.
    """
    import torch

    if name is not None:
        device = open_device(name)
        if device.type != "cuda" or device.index is not None or processes == 1:
            return device
    elif not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def use_tensor_cores(device: torch.device) -> None:
    """Let matrix products in float32 use a GPU's TF32, which rounds their factors to 10 bits of mantissa.

    The environment variable NVIDIA_TF32_OVERRIDE=0 forbids it.
    """
    import torch

    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def choose_dtype(name: str, trained: str | None, device: torch.device) -> torch.dtype:
    """Return the precision that `--dtype` means for captioning.

    Args:
        name: the flag's value; "auto" leaves it to the adapter and the device.
        trained: the mixed precision that the adapter was trained in ("no", "bf16", "fp16"), None if unknown.
        device: where the model runs.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if trained == "fp16":
        return torch.float32 if device.type == "cpu" else torch.float16
    return torch.bfloat16 if trained != "no" and has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device itself computes in bfloat16: GPUs since Ampere, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Private, but nothing public tells; without them it is float32.
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def choose_precision(device: torch.device) -> tuple[str, str]:
    """Return what `--mixed_precision auto` means on a device, "bf16" or "no", and why.

    bfloat16 that a device emulates is slower than float32. What it says that it can is tried.
    """
    import torch

    if device.type not in ("cuda", "cpu") or not has_bfloat16(device):
        return "no", f"{device.type} does not compute in bfloat16 itself"
    factors = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    exact, rounded = factors[0] @ factors[1], factors[0].bfloat16() @ factors[1].bfloat16()
    if not torch.allclose(rounded.float(), exact, rtol=0, atol=0.02 * float(exact.abs().max())):
        return "no", f"{device.type} computes something else in bfloat16"
    return "bf16", f"{device.type} computes in bfloat16 itself"


def move_batch(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Move a batch to a device.

    Args:
        batch: name → tensor, or anything else, which is not changed.
        device: the device.
        dtype: precision of the model; pixels and other floating-point tensors are converted to it.
    """

    import torch

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point weight, in which it expects pixels."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

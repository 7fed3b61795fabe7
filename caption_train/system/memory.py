"""Returns freed memory from glibc's heap to the system, measures memory, and pauses what looks for garbage.

What concerns glibc is skipped for other C libraries.

glibc's heap shrinks only from its end. So freed memory below one small tensor that is still in use stays with
the process, in addition to everything allocated later.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's parameters: how much free heap it keeps, and from which size an allocation has its own pages."""

VARIABLES = {M_TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_", M_MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_"}
NO_GLIBC = (OSError, AttributeError, TypeError)
"""Errors of these calls with another C library or on another system."""


def trim_heap() -> None:
    """Return all free pages of the heap to the system. Taking them again later costs time."""
    with suppress(*NO_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def trimming_heap() -> Iterator[None]:
    """Let glibc return freed memory at once inside the `with` block, while weights are read and quantized.

    By default glibc keeps so much that a quantized base needed more memory on a CPU than a full one.
    Afterwards the defaults are restored: in training, memory that glibc keeps makes steps twice as fast.
    """
    try:
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**16)
    except NO_GLIBC:
        library = None
    try:
        yield
    finally:
        if library is not None:
            # Restore what the user set in the environment, or the value that glibc adapts to by itself.
            for name, by_itself in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**26)):
                asked = os.environ.get(VARIABLES[name], "")
                library.mallopt(name, int(asked) if asked.isdecimal() else by_itself)
            trim_heap()


@contextmanager
def pausing_garbage_collection() -> Iterator[None]:
    """Look for no cycles of garbage inside the `with` block, which makes very many objects that stay.

    So importing torch, transformers and PEFT takes a tenth less time, and a million pairs are read without
    going through all that was imported again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class HeapTrimmer:
    """Trims glibc's heap around optimizer steps of full training on a CPU.

    There, backward pass and step free about as much as the model's size. The first step makes the optimizer's
    state; placed among freed memory, the state would keep the heap from shrinking ever again.

    Args:
        applies: whether all weights are trained on a CPU. The steps of a LoRA free little, and would be
            slower.
    """

    def __init__(self, applies: bool) -> None:
        self.applies, self.has_state = applies, False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run the optimizer step inside the `with` block, after returning what the backward pass freed."""
        if not self.applies:
            yield
            return
        trim_heap()
        with nullcontext() if self.has_state else trimming_heap():
            yield
        self.has_state = True

    def stepped(self) -> None:
        """Return the memory of the gradients, which are freed by now."""
        if self.has_state:
            trim_heap()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage, which includes the memory of the process that forked this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    # macOS counts bytes, others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Return the bytes that this process holds in memory now."""
    import psutil

    return psutil.Process().memory_info().rss


def start_peak(device: torch.device) -> int:
    """Let `peak_memory` count from now on where it can; return the bytes that are held now, in its terms."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident_memory()


def available_memory(device: torch.device) -> int:
    """Return how many bytes this process could take besides what it holds, before anything is swapped."""
    if device.type == "cuda":
        import torch

        # What torch has reserved and does not use serves the next tensors.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil

    return min([psutil.virtual_memory().available, *_find_room_in_container()])


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where Linux says what a control group may use, uses and only caches; in version 2, then in version 1."""


def _find_room_in_container() -> Iterator[int]:
    """Yield the room in each control group with a limit that this process is in, such as a job of Slurm's."""
    own = _find_own_groups()
    for controller, (limit, usage, cached) in _LIMITS.items():
        root = CGROUPS / controller
        place = root.joinpath(*own.get(controller, ()))
        # In a container, its own path may be that of the host, and the root is its group.
        for group in (place, *place.parents[: len(place.parts) - len(root.parts)]):
            # "max" is no number: there is no limit.
            with suppress(OSError, ValueError):
                room = int((group / limit).read_text("utf-8")) - int((group / usage).read_text("utf-8"))
                lines = (group / "memory.stat").read_text("utf-8").splitlines()
                free = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cached} "))
                yield max(room + free, 0)


def _find_own_groups() -> dict[str, list[str]]:
    """Return controller → path, in parts, of the group of this process."""
    try:
        lines = OWN_CGROUPS.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    found = {}
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        # `..`: a group outside of those that this process sees.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        found |= dict.fromkeys(controllers.split(","), parts)
    return found

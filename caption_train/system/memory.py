"""What glibc keeps after it was freed, and would hold beside what comes next. Elsewhere nothing is done.

Its heap shrinks only from its end, so what lies below one small tensor that lives on stays with the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for how much free heap it keeps, and from which size an allocation has pages of its own."""

VARIABLES = {M_TRIM_THRESHOLD: "MALLOC_TRIM_THRESHOLD_", M_MMAP_THRESHOLD: "MALLOC_MMAP_THRESHOLD_"}
NO_GLIBC = (OSError, AttributeError, TypeError)
"""Raised where there is another C library, or another system."""


def trim_heap() -> None:
    """Give every whole free page back to the system. Pages cost time when they are needed again."""
    with suppress(*NO_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def trimming_heap() -> Iterator[None]:
    """Have glibc give back at once what is freed, as weights are read and quantized one after the other.

    Left to itself it keeps so much that a quantized base took more on a CPU than a whole one. Afterwards it
    is as it was: in training, memory that it keeps makes steps twice as fast.
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
            # What the user asked for, or what it comes to by itself.
            for name, by_itself in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**26)):
                asked = os.environ.get(VARIABLES[name], "")
                library.mallopt(name, int(asked) if asked.isdecimal() else by_itself)
            trim_heap()


class HeapTrimmer:
    """Holds little that is freed around optimizer steps, where they and backward passes free a model's size.

    The first step makes the optimizer's state: between what steps free it would keep the heap from ever
    shrinking. applies: only to every weight trained on a CPU; a LoRA's steps free little and would be slower.
    """

    def __init__(self, applies: bool) -> None:
        self.applies, self.has_state = applies, False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Run the optimizer's step without what the backward pass freed."""
        if not self.applies:
            yield
            return
        trim_heap()
        with nullcontext() if self.has_state else trimming_heap():
            yield
        self.has_state = True

    def stepped(self) -> None:
        """Give back the gradients, which are gone by now."""
        if self.has_state:
            trim_heap()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        # getrusage would also count what the process held that started this one.
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

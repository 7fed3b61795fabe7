"""What the machine could do at best: FLOPs of a piece of work, and the rate of a large matrix product."""

import time
from typing import Any

PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices."""
TRIES = 3


class Counting:
    """Counts the FLOPs of matrix products and convolutions until it is stopped.

    torch knows those of no fused attention on a CPU, so attention is computed from products meanwhile: the
    counted piece of work is not a timed one.
    """

    def __init__(self) -> None:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        self.attention, self.counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
        self.attention.__enter__()
        self.counter.__enter__()

    def stop(self) -> int:
        """Return the FLOPs."""
        self.counter.__exit__(None, None, None)
        self.attention.__exit__(None, None, None)
        return self.counter.get_total_flops()


def start_counting() -> Counting:
    """Begin to count."""
    return Counting()


def measure_peak(device: Any, dtype: Any) -> float:
    """Return the FLOPs a second of a matrix product, the best of some tries."""
    import torch

    size = PRODUCT[device.type]
    # Zeros and ones use less power than numbers do, and a GPU is faster on them.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(TRIES + 1):  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def start_profiling() -> Any:
    """Begin to record kernels."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    profiler.__enter__()
    return profiler


def name_kernels(profiler: Any, count: int = 10) -> list[list]:
    """Stop recording; return the kernels or operators that took longest, each with its milliseconds."""
    import torch

    profiler.__exit__(None, None, None)
    events, key = profiler.key_averages(), "self_cpu_time_total"
    if torch.cuda.is_available():
        # Operators have the time of the kernels that they launch, too.
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        key = "self_device_time_total"
    events = sorted(events, key=lambda event: -getattr(event, key))[:count]
    return [[event.key[:80], round(getattr(event, key) / 1000, 2)] for event in events]

"""Decides how many processes read images ahead of the model, carries their batches over, and ends them."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import ProcessError, is_dead_worker
from caption_train.system.signals import NoAnswer, limiting_wait, was_interrupted

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that a worker makes ahead: torch's default."""
FILES_OF_PROCESS, FILES_OF_WORKER = 40, 24
"""File descriptors that a process needs, and each worker besides: its pipes, and a file for each tensor."""
SMALL = 4 << 30
"""With as much shared memory as this, no batch is measured: that takes a moment."""


def limit_workers(asked: int, measure_batch: Callable[[], int]) -> tuple[int, str | None]:
    """Return how many workers this machine has room for, and a line that says so if it is fewer than `asked`.

    Batches go from the workers to this process through /dev/shm. Docker gives it 64 MB.

    Args:
        asked: the value of `--num_workers`.
        measure_batch: returns how many bytes a batch has.
    """
    if not asked:
        return 0, None
    problems = {}
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else SMALL
    if free < SMALL:
        free //= max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
        batch = max(measure_batch(), 1)
        # Each worker makes some batches ahead; besides, one is used and one is on its way.
        room = max(free // batch - PREFETCHED, 0) // PREFETCHED
        problems[room] = (
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free and a batch takes {batch / 1e6:,.1f} MB "
            "(docker run --shm-size=2g makes it larger)"
        )
    if (files := _read_file_limit()) is not None:
        room = max(files - FILES_OF_PROCESS, 0) // FILES_OF_WORKER
        problems[room] = f"a process may have {files} files open (ulimit -n 1024 allows more)"
    room = min(problems, default=asked)
    if room >= asked:
        return asked, None
    return room, f"--num_workers {asked}: {room or 'none'} used: {problems[room]}"


def limit_batch(workers: int, image: int) -> int:
    """Return how many images of `image` bytes a batch may have, so that all workers' batches have room."""
    if not SHARED_MEMORY.is_dir():
        return sys.maxsize
    free = shutil.disk_usage(SHARED_MEMORY).free // max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    return free // (PREFETCHED * (workers + 1)) // max(image, 1)


def default_workers(device: torch.device, processes: int = 1) -> int:
    """Return how many workers a training process has if none are asked for: with a GPU up to 4, else none.

    On a CPU, the model has all cores to itself.
    """
    cores = (os.cpu_count() or 1) // processes
    return max(0, min(4, cores - 1)) if device.type == "cuda" else 0


def choose_workers(device: torch.device, megapixels: float, processes: int = 1) -> int:
    """Return what `--num_workers auto` means: as many as keep the model busy, and no more than spare cores.

    To read a megapixel takes a core about 20 ms. A GPU is taken to train on or caption 200 images a second at
    most. On a CPU the model has all cores, but for one that reads while it computes where images are large.

    Args:
        device: where the model runs.
        megapixels: of an image, about.
        processes: how many run models on this machine.
    """
    spare = count_cores() // processes - 1
    if device.type != "cuda":
        return int(spare >= 1 and megapixels >= 1)
    return max(0, min(spare, _MOST_WORKERS, math.ceil(4 * megapixels)))


_MOST_WORKERS = 16


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_file_limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit


class ByPipe:
    """A tensor in a worker that becomes a tensor again in the main process, sent as bytes through a pipe."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple:
        import torch

        # numpy has no bfloat16, so it is given the bytes.
        raw = self.tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _from_bytes, (raw, self.tensor.dtype, tuple(self.tensor.shape))


def _from_bytes(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.from_numpy(raw).view(dtype).reshape(shape)


def hand_over(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make the tensors of a batch ready to be sent to the main process, if this is a worker.

    torch would put them into shared memory later, in a thread whose errors are lost together with the batch:
    the main process would wait for it for ever. What has no room there is sent through the pipe, slower.
    """
    import torch

    def move(value: Any) -> Any:
        if hasattr(value, "map_tensors"):
            return value.map_tensors(move)
        if not isinstance(value, torch.Tensor):
            return value
        try:
            return value.share_memory_()
        except (RuntimeError, OSError):
            return ByPipe(value)

    is_worker = torch.utils.data.get_worker_info() is not None
    return {name: move(value) if is_worker else value for name, value in inputs.items()}


@contextmanager
def reading(loader: DataLoader, advise: Callable[[], str] | None = None) -> Iterator[Iterator[Any]]:
    """Yield an iterator of a loader. If the `with` block ends early, its workers are killed, even hung ones.

    A signal ends the wait for a worker that does not answer: see `limiting_wait`.

    Args:
        loader: the loader.
        advise: returns what to add to the message of an error.

    Raises:
        ProcessError: a worker died or does not answer within the loader's timeout.
    """
    batches, finished = None, False
    try:
        batches = iter(loader)
        yield _wait_for(batches, loader.timeout) if loader.num_workers else batches
        finished = True
    except OSError as error:
        if batches is not None:
            raise
        _end_half_made(error)
        raise ProcessError(
            f"--num_workers {loader.num_workers}: processes that read images cannot be started: "
            f"{error.strerror or error}; use fewer, or 0"
        ) from error
    except (RuntimeError, NoAnswer) as error:
        is_late = isinstance(error, NoAnswer) and not was_interrupted()
        if (reason := _explain("DataLoader timed out" if is_late else str(error), loader)) is None:
            raise
        raise ProcessError(f"{reason}; {advise()}" if advise else reason) from error
    finally:
        if not finished:
            _kill_workers(batches)


@contextmanager
def explaining_dead_worker(num_workers: int) -> Iterator[None]:
    """Turn the error of a worker that died into one line, where batches are used outside of `reading`."""
    try:
        yield
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise ProcessError(f"--num_workers {num_workers}: {_DIED}") from error


def _wait_for(batches: Iterator[Any], timeout: float) -> Iterator[Any]:
    while True:
        # One second more, so that torch's own timeout comes first.
        with limiting_wait(timeout and timeout + 1):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


_DIED = "a process that reads images died, most likely of too little memory; use fewer"


def _explain(message: str, loader: DataLoader) -> str | None:
    flag = f"--num_workers {loader.num_workers}"
    if message.startswith("DataLoader worker"):
        return f"{flag}: {_DIED}"
    if message.startswith("DataLoader timed out"):
        return (
            f"{flag}: no process that reads images answered within {loader.timeout:g} seconds; check the "
            "disk that holds the images, or wait longer with --worker_timeout"
        )
    if "Communication with the workers" in message:
        return f"{flag}: too many open files: use fewer, or allow more with ulimit -n 4096"
    return None


def _end_half_made(error: OSError) -> None:
    """End the workers of an iterator that could not be made; torch's own end of it fails with a traceback."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        half_made = frame.f_locals.get("self")
        if type(half_made).__name__ == "_MultiProcessingDataLoaderIter":
            _kill_workers(half_made)
            half_made._shutdown = True


def _kill_workers(batches: Any) -> None:
    """End the workers of an iterator. They ignore SIGTERM, and torch waits for those that are stopped."""
    workers = [worker for worker in getattr(batches, "_workers", ()) if worker.pid is not None]
    if not workers:
        return
    # torch's own handler of SIGCHLD raises an error for every worker that it did not end itself.
    is_main = threading.current_thread() is threading.main_thread()
    can_set = is_main and hasattr(signal, "SIGCHLD")
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if can_set else None
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=1)
    finally:
        if previous is not None:
            signal.signal(signal.SIGCHLD, previous)

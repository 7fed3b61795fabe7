"""Processes that do the same work in different ways, taking turns: only one of them works at a time.

Each side is a process of its own, so that imports, memory and global state of one do not touch another. It
does a piece of work (a training step, a folder of images) when it is told to, and answers with what it took.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}


class Side:
    """The parent's end of one side.

    Args:
        spec: what the process shall do: `row`, `side` and what they need, see worker.py.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.worker", json.dumps(spec)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("SPEED_DEBUG") else None,
            text=True,
            env=os.environ | OFFLINE,
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer; RuntimeError with the last line on stderr where the process has ended."""
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read() if self.process.stderr else ""
            self.process.wait()
            raise RuntimeError(([line for line in said.splitlines() if line.strip()] or ["killed"])[-1])
        return json.loads(line)

    def tell(self, command: str) -> dict[str, Any]:
        """Send a command: `go`, `count` (go, and count FLOPs), `peak`, `kernels`; return its answer."""
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.answer()

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.communicate()


class Gate:
    """The worker's end: waits for its turn, and measures the work between one turn and the next.

    Args:
        device: the device of the work.
        dtype: the precision of its products, for the peak of a matrix product.
    """

    def __init__(self, device: Any, dtype: Any) -> None:
        self.device, self.dtype = device, dtype
        # What libraries print must not lie between the answers.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.counter = self.profiler = self.memory = self.started = None
        self.wait_for_data = 0.0

    def wait(self, **facts: Any) -> None:
        """Answer with the work since the last call and `facts`; return when the next piece is due.

        Ends the process when the parent is gone.
        """
        from benchmarks.harness import Memory
        from benchmarks.speed.limit import measure_peak, name_kernels, start_counting, start_profiling

        facts |= self._stop()
        while True:
            print(json.dumps(facts), file=self.out, flush=True)
            command = sys.stdin.readline().strip()
            if command != "peak":
                break
            facts = {"flops_per_second": measure_peak(self.device, self.dtype)}
        if not command:
            os._exit(0)
        self.memory = self.memory or Memory(self.device)
        self.counter = start_counting() if command == "count" else None
        self.profiler = start_profiling() if command == "kernels" else None
        self._name_kernels = name_kernels
        self.wait_for_data = 0.0
        self.started = time.perf_counter(), cpu_seconds()

    def _stop(self) -> dict[str, Any]:
        if self.started is None:
            return {"ready": True}
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        took = {
            "seconds": time.perf_counter() - self.started[0],
            "cpu_seconds": cpu_seconds() - self.started[1],
            "data_seconds": self.wait_for_data,
            "peak_bytes": self.memory.peak(),
        }
        if self.counter is not None:
            took["flops"] = self.counter.stop()
        if self.profiler is not None:
            took["kernels"] = self._name_kernels(self.profiler)
        return took

    def watch_loaders(self) -> None:
        """Count the time that anything waits for the next batch of a DataLoader."""
        from torch.utils.data.dataloader import _BaseDataLoaderIter

        following: Callable = _BaseDataLoaderIter.__next__

        def timed(iterator: Any) -> Any:
            started = time.perf_counter()
            try:
                return following(iterator)
            finally:
                self.wait_for_data += time.perf_counter() - started

        _BaseDataLoaderIter.__next__ = timed


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those of its children that have ended."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system

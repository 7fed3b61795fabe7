"""Handles Ctrl-C, SIGTERM, a lost terminal and Slurm's SIGUSR1: finishes the step, saves and exits."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from caption_train.errors import CaptionTrainError
from caption_train.system.launcher import is_torchrun, read_command, relaunch_command

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
ECHO_SECONDS = 1.0
"""torchrun and mpirun forward a signal that the terminal sent to all; so two this close count as one."""

ANSWER_SECONDS = 5.0
"""How long a worker that is waited for may take after a signal: `docker stop` kills after ten."""


class Interrupted(CaptionTrainError):
    """The run was asked to stop and has saved itself. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class NoAnswer(BaseException):
    """A worker that is waited for does not answer in time. No `except Exception` catches it."""


class Interrupts:
    """Records the first signal, which the loop acts on after its step. A second signal ends the process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.number = 0
        self.noted = 0.0
        self.parent = os.getppid()
        self.launch = read_command(self.parent)
        self.has_echo = accelerator.num_processes > 1 or is_torchrun(self.launch)

    def __enter__(self) -> Self:
        self.previous = {}
        for number in SIGNALS:
            # Under nohup, SIGHUP is ignored, and must stay so.
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)
        _active.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Return whether any process got a signal; all processes get the same answer at the same step."""
        if self.accelerator.num_processes > 1:
            import torch

            numbers = torch.tensor([self.number], device=self.accelerator.device)
            self.number = int(self.accelerator.gather(numbers).max())
        return self.number != 0

    def leave(self, checkpoint: Path) -> None:
        """Raise Interrupted with the command that continues from this checkpoint."""
        name = signal.Signals(self.number).name
        own = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv)] or ["python"]
        # `python -m caption_train`, or `-m` of a launcher, is started by the package's name.
        script = "caption_train" if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
        start = relaunch_command(script, self.launch, own)
        command = shlex.join([*start, script, *_without_resume(sys.argv[1:]), "--resume", "auto"])
        raise Interrupted(f"{name}: saved to {checkpoint}; go on with: {command}", self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if not self._is_echo(number):
                os._exit(128 + number)
            return
        self.number, self.noted, self.parent = number, time.monotonic(), os.getppid()
        # os.write, because the signal may have interrupted a print() that holds the lock of stderr.
        words = f"\n{signal.Signals(number).name}: finishing this step, then saving; once more to leave now\n"
        os.write(2, words.encode())
        if _waits:
            signal.setitimer(signal.ITIMER_REAL, ANSWER_SECONDS)

    def _is_echo(self, number: int) -> bool:
        """Tell whether a signal is only the first one again, forwarded by a launcher, not the second."""
        if os.getppid() != self.parent:
            # The same Ctrl-C ended `accelerate launch`, after which the system sends SIGTERM once.
            self.parent = os.getppid()
            return number == signal.SIGTERM
        return self.has_echo and time.monotonic() - self.noted <= ECHO_SECONDS


def ignore_in_worker(worker_id: int) -> None:
    """Ignore signals in a DataLoader worker: its process needs it until a step is finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_active: list[Interrupts] = []
_waits: list[float] = []


@contextmanager
def limiting_wait(seconds: float) -> Iterator[None]:
    """Wait for a DataLoader worker inside the `with` block, at most `seconds` (0: as long as it takes).

    After a signal to a training run it may only take ANSWER_SECONDS more. torch's own timeout does not count
    while a batch is carried over, and without an end to the wait one signal would not end the run.

    Raises:
        NoAnswer: it took longer.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and hasattr(signal, "setitimer")):
        yield
        return
    previous = signal.signal(signal.SIGALRM, _end_wait)
    _waits.append(seconds)
    try:
        signal.setitimer(signal.ITIMER_REAL, ANSWER_SECONDS if was_interrupted() else seconds)
        yield
    finally:
        _waits.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def not_limited() -> Iterator[None]:
    """Stop the clock of `limiting_wait`, if it runs, inside the `with` block: this process is at work."""
    is_main = threading.current_thread() is threading.main_thread()
    left = signal.setitimer(signal.ITIMER_REAL, 0)[0] if is_main and _waits else 0.0
    try:
        yield
    finally:
        if left:
            signal.setitimer(signal.ITIMER_REAL, left)


def was_interrupted() -> bool:
    """Tell whether a training run of this process got a signal."""
    return any(interrupts.number for interrupts in _active)


def _end_wait(number: int, frame: FrameType | None) -> None:
    if _waits:
        raise NoAnswer


def _without_resume(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        skip = argument == "--resume"
    return kept


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Let SIGTERM end the `with` block as Ctrl-C does."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

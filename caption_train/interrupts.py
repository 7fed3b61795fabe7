"""Ctrl-C, SIGTERM, a lost terminal and Slurm's SIGUSR1: finish the step, save, leave as the shell expects."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator

from caption_train.errors import CaptionTrainError
from caption_train.launcher import name_launch, read_command

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
ECHO_SECONDS = 1.0
"""Launchers pass on what the terminal or Slurm sent to everyone: signals this close together are one."""


class Interrupted(CaptionTrainError):
    """The run was asked to stop and has saved itself; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Notes the first signal, for the loop to act on after its step; a second one ends the process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.number = 0
        self.noted = 0.0

    def __enter__(self) -> Self:
        self.previous = {}
        for number in SIGNALS:
            # A run under nohup has asked not to hear of its terminal.
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Return whether any process got a signal: every process gets the same answer at the same step."""
        if self.accelerator.num_processes > 1:
            numbers = torch.tensor([self.number], device=self.accelerator.device)
            self.number = int(self.accelerator.gather(numbers).max())
        return self.number != 0

    def leave(self, checkpoint: Path) -> None:
        """Raise Interrupted, naming the command that goes on from here."""
        name = signal.Signals(self.number).name
        start = name_launch(sys.argv[0], read_command(os.getppid()))
        command = shlex.join([*start, sys.argv[0], *_without_resume(sys.argv[1:]), "--resume", "auto"])
        raise Interrupted(f"{name}: saved to {checkpoint}; go on with: {command}", self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number:
            if now - self.noted > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self.number, self.noted = number, now
        # Not print(), whose lock this may have interrupted.
        words = f"\n{signal.Signals(number).name}: finishing this step, then saving; once more to leave now\n"
        os.write(2, words.encode())


def ignore_in_worker(worker_id: int) -> None:
    """Leave the signals to the process that trains: it needs its workers until its step is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _without_resume(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        skip = argument == "--resume"
    return kept

"""Ctrl-C, SIGTERM and Slurm's SIGUSR1: finish the step, save, leave with the shell's exit code."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator

from caption_train.errors import CaptionTrainError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


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

    def __enter__(self) -> Self:
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
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

    def leave(self, output_dir: Path) -> None:
        """Raise Interrupted, naming the command that goes on from here."""
        name = signal.Signals(self.number).name
        command = " ".join([Path(sys.argv[0]).name, *_without_resume(sys.argv[1:]), "--resume auto"])
        raise Interrupted(f"{name}: saved to {output_dir / 'last'}; go on with: {command}", self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr)


def _without_resume(arguments: list[str]) -> list[str]:
    if "--resume" not in arguments:
        return arguments
    at = arguments.index("--resume")
    return arguments[:at] + arguments[at + 2 :]

"""Defines what a captioning run asks of whatever makes its captions. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from caption_train.adapters.record import Base
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.config.captioning import CaptionOptions
from caption_train.families.base import Family
from caption_train.system.processes import Processes


class Engine(ABC):
    """Makes captions. Its methods are called in this order: `describe` (by the main process), `open`, then
    `caption` for each chunk, or `stream` once.

    Attributes:
        always_says_prompt: whether the first line names a prompt that is empty, too.
    """

    always_says_prompt = False

    def __init__(self, family: Family, base: Base, options: CaptionOptions, processes: Processes) -> None:
        self.family, self.base, self.options, self.processes = family, base, options, processes

    @abstractmethod
    def describe(self) -> str:
        """Return what captions, and where, as the run's first line says it.

        Raises:
            UsageError: it cannot be with these flags.
        """

    def open(self) -> list[str]:
        """Load what is needed; return lines on what the model reads of an image.

        Raises:
            CaptionTrainError: it cannot be loaded.
        """
        return []

    @abstractmethod
    def stream(self, tasks: Iterable[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Yield a result for each task, in order. Tasks are read ahead of the results, some batches of them.

        Raises:
            CaptionTrainError: nothing more can be captioned.
        """

    def caption(self, tasks: Sequence[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Do what `stream` does for tasks that are all known."""
        return self.stream(tasks)

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Let go of what `open` took."""

    def name_model(self) -> str:
        """Return the model, and the adapter if there is one."""
        return self.base.model_id + (f" and {self.options.peft_model}" if self.options.peft_model else "")

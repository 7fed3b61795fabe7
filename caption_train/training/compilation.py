"""Compiles the repeated blocks of a model with torch.compile, and says after how many steps it has paid.

Blocks are compiled, not the whole model: they are alike, so the compiler works once for all of a kind, and
what lies between them (the loss, embeddings) stays as it is. Only training steps run the compiled code:
validation and previews have other shapes, and would compile again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from caption_train.errors import CaptionTrainError
from caption_train.training.memory.gradient_checkpointing import find_blocks, is_recomputed_here

PLAIN_STEPS = 4
"""Steps at the start of a run that are not compiled, for comparison. The first only warms up."""
QUIET_STEPS = 5
"""So many steps in which nothing was compiled end the warm-up."""
MOST_STEPS = 30
"""The compiler is stopped if it still works after so many steps: shapes change with every batch."""


class Compilation:
    """Compiles a model's blocks after the first steps of a run, and measures.

    Args:
        model: as it is trained, adapters included.
        first_step: the step that the run begins with: a resumed run is compiled from its start.
        say: prints a line.
    """

    def __init__(self, model: nn.Module, first_step: int, say: Callable[[str], None]) -> None:
        self.model, self.say = model, say
        self.plain: list[float] = []
        self.warm_up: list[float] = []
        self.compiled: list[float] = []
        self.is_on = self.is_over = False
        self.graphs = 0
        if first_step >= PLAIN_STEPS:
            self._start()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn a failure of the compiler into one line, for everything inside of the `with`."""
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            yield
        except (TorchDynamoException, InductorError) as error:
            cause = getattr(error, "inner_exception", None) or error
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise CaptionTrainError(
                f"--compile: torch.compile failed: {reason[:200]}; install a C++ compiler (g++) if there is "
                "none, delete the compiler's folder (TORCHINDUCTOR_CACHE_DIR), or leave the flag out"
            ) from error

    def after_step(self, seconds: float) -> None:
        """Take note of a step, and compile when enough plain ones were seen.

        Args:
            seconds: what the step took.
        """
        if self.is_over:
            return
        if not self.is_on:
            self.plain.append(seconds)
            if len(self.plain) == PLAIN_STEPS:
                self._start()
            return
        graphs = count_graphs()
        if graphs > self.graphs:
            self.graphs = graphs
            # The steps between two compilations belong to the warm-up too.
            self.warm_up += [*self.compiled, seconds]
            self.compiled = []
        else:
            self.compiled.append(seconds)
        if len(self.compiled) == QUIET_STEPS:
            self.say(self._describe())
            self.is_over = True
        elif len(self.warm_up) + len(self.compiled) >= MOST_STEPS:
            self.stop()
            self.say(
                f"--compile: the compiler still works after {MOST_STEPS} steps, because shapes of batches "
                "change: going on without it"
            )

    def stop(self) -> None:
        """Go on without compiled code."""
        self.is_on, self.is_over = False, True

    def _start(self) -> None:
        self.is_on, self.graphs = True, count_graphs()
        # transformers recomputes the others outside of their forward.
        blocks = [block for block in find_blocks(self.model) if not is_recomputed_here(block)]
        for block in blocks:
            compiled = torch.compile(block.forward, dynamic=True)
            block.forward = partial(self._forward, block, block.forward, compiled)
        if not blocks:
            self.stop()
            self.say("--compile: finds no blocks that it can compile: does nothing here")

    def _forward(
        self, block: nn.Module, plain: Callable, compiled: Callable, *args: Any, **keywords: Any
    ) -> Any:
        is_step = self.is_on and block.training and torch.is_grad_enabled()
        return (compiled if is_step else plain)(*args, **keywords)

    def _describe(self) -> str:
        now = median(self.compiled)
        if len(self.plain) < PLAIN_STEPS:
            return f"--compile: compiled in {sum(self.warm_up):.0f} s; a step takes {now:.2f} s"
        before = median(self.plain[1:])
        cost = max(sum(self.warm_up) - len(self.warm_up) * now, 0)
        line = f"--compile: {cost:.0f} s to compile; a step takes {now:.2f} s, without it {before:.2f} s"
        if now >= before:
            return f"{line}: it does not pay here, leave it out"
        return f"{line}: it has paid after {cost / (before - now):,.0f} steps"


def count_graphs() -> int:
    """Return how many graphs torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

"""Checks whether a run learns: finds untrained LoRA modules, losses that are not finite and sudden jumps."""

import math
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import nn

from caption_train.errors import CaptionTrainError
from caption_train.system.console import print_once
from caption_train.training.checkpoints.find import describe_latest
from caption_train.training.run.batches import MicroBatch
from caption_train.training.run.run import TrainingRun

MEMORY = 0.95
"""Share of the running loss that each step keeps; it covers about the last twenty steps."""

SPIKE = 6.0
"""A loss this many standard deviations above the running mean is a spike."""

WARM_UP = 20
"""Steps before the running loss is reliable enough to find spikes."""

PATIENCE = 20
"""Steps within which a LoRA module must change if blocks are left out at random; otherwise it is one."""


class Health:
    """Judges every step of a run. All processes come to the same result."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.untried = copy_lora_b(run.model) if run.progress.global_step < PATIENCE else {}
        self.tries = 0

    def is_good(self, loss: float, grad_norm: float) -> bool:
        """Return whether a step with this loss and gradient may be taken."""
        return math.isfinite(loss) and math.isfinite(grad_norm)

    def note_good(self, loss: float, micro_batches: Sequence[MicroBatch]) -> None:
        """Record that a step was taken; print a line with the files of the step if its loss jumped."""
        progress = self.run.progress
        progress.bad_steps = 0
        if progress.loss_mean is None:
            progress.loss_mean = loss
        deviation = loss - progress.loss_mean
        if progress.global_step >= WARM_UP and deviation > SPIKE * math.sqrt(progress.loss_variance):
            self._say(
                f"step {progress.global_step + 1}: loss {loss:.4f} jumped from about "
                f"{progress.loss_mean:.4f}; files: {self._list_files(micro_batches)}"
            )
        # Exponentially weighted mean and variance of the losses so far.
        progress.loss_mean += (1 - MEMORY) * deviation
        progress.loss_variance = MEMORY * (progress.loss_variance + (1 - MEMORY) * deviation**2)

    def note_bad(self, loss: float, micro_batches: Sequence[MicroBatch], overflow: bool) -> None:
        """Record that a step was not taken.

        Args:
            loss: the loss of the step.
            micro_batches: what the step was computed from.
            overflow: whether only fp16's loss scale was too high. It adapts by itself, so such a step is not
                a bad one.

        Raises:
            CaptionTrainError: after `--max_bad_steps` in a row.
        """
        progress, most = self.run.progress, self.run.options.max_bad_steps
        progress.skipped_steps += 1
        if overflow:
            return
        progress.bad_steps += 1
        files = self._list_files(micro_batches)
        step = progress.global_step + 1
        reason = f"loss or gradient was not finite (loss {loss})" if files else "no image could be read"
        if progress.bad_steps >= most:
            raise CaptionTrainError(
                f"--max_bad_steps: {most} steps in a row could not be taken up to step {step}: {reason}"
                + (f"; files: {files}; lower --learning_rate or set --max_grad_norm; " if files else "; ")
                + describe_latest(self.run.options.output_dir)
            )
        self._say(f"step {step} skipped: {reason}" + (f"; files: {files}" if files else ""))

    def check_alive(self) -> None:
        """Raise if a LoRA module did not change at the first step: it would silently stay untrained.

        Stochastic depth leaves blocks out at random; if a batch is one image, a block is left out completely.
        Modules of such a model have PATIENCE steps to change.
        """
        if not self.untried or self.run.lr_scheduler.get_last_lr()[0] == 0:
            return
        dead = find_dead_modules(self.run.model, self.untried)
        self.untried = {name: b for name, b in self.untried.items() if name_module(name) in set(dead)}
        self.tries += 1
        skips = any(getattr(module, "drop_prob", 0) for module in self.run.model.modules())
        if dead and self.tries >= (PATIENCE if skips else 1):
            raise CaptionTrainError(
                f"--target_modules: {len(dead)} LoRA modules get no gradient and would stay untrained: "
                + ", ".join(dead)
            )

    def _list_files(self, micro_batches: Sequence[MicroBatch]) -> str:
        return ", ".join(gather_object([file for m in micro_batches for file in m.files]))

    def _say(self, line: str) -> None:
        print_once(self.run.accelerator, line)


def copy_lora_b(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every `lora_B`, to compare with after the first step."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}


def find_dead_modules(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of modules whose `lora_B` did not change in an optimizer step.

    `lora_B` starts at zero and has a gradient at once; `lora_A` has one only from the second step on.

    Args:
        model: the model with LoRA, after the step.
        before: what `copy_lora_b` returned before it.
    """
    now = {name: p for name, p in model.named_parameters() if name in before}
    same = [name for name, value in before.items() if torch.equal(now[name], value)]
    return [name_module(name) for name in same]


def name_module(name: str) -> str:
    """Return the name in the base model of the module that a `lora_B` belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_B")[0]

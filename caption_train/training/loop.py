"""Trains a model of any family: the loop over steps, and what one step does."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from caption_train.errors import ProcessError
from caption_train.system.console import ProgressBar, print_once
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.lock import OutputLock
from caption_train.system.memory import HeapTrimmer
from caption_train.system.processes import keep_groups
from caption_train.system.signals import Interrupts, NoAnswer
from caption_train.system.workers import reading
from caption_train.training.checkpoints.find import describe_latest
from caption_train.training.checkpoints.state import restore_random_state
from caption_train.training.checkpoints.store import explain_failure
from caption_train.training.compilation import Compilation
from caption_train.training.distributed.accelerator import accumulate
from caption_train.training.distributed.ranks import raise_on_all_ranks, report_once
from caption_train.training.failures import explain_out_of_memory
from caption_train.training.monitor.health import Health
from caption_train.training.monitor.log import RunLog
from caption_train.training.monitor.samples import PreviewCaptioner
from caption_train.training.monitor.validation import Evaluator
from caption_train.training.results import complete_card, push
from caption_train.training.run.batches import MicroBatch
from caption_train.training.run.run import TrainingRun
from caption_train.training.saving import CheckpointSaver

LEAST_SCALE = 1.0
"""fp16's loss scale is halved at every overflow. Below this, the scale is not what overflows."""


class Trainer:
    """Trains a run from the step in its progress to the end of its plan.

    Args:
        run: everything that was prepared.
        evaluator: validates.
        sampler: captions previews.
        saver: saves checkpoints.
        log: writes numbers.
        lock: the lock on the output folder, released at the end.
    """

    def __init__(
        self,
        run: TrainingRun,
        evaluator: Evaluator,
        sampler: PreviewCaptioner,
        saver: CheckpointSaver,
        log: RunLog,
        lock: OutputLock,
    ) -> None:
        self.run, self.evaluator, self.sampler, self.saver = run, evaluator, sampler, saver
        self.log, self.lock = log, lock
        self.health = Health(run)
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        self.dtype = model_dtype(run.model)
        self.compilation = None
        if run.options.compile:
            say = partial(print_once, run.accelerator)
            self.compilation = Compilation(run.model, run.plan.first_step, say)
        self.heap = HeapTrimmer(run.options.train_method == "full" and run.accelerator.device.type == "cpu")

    def train(self) -> dict[str, Any]:
        """Run the loop, save the result to `output_dir`, and return the summary, which is saved beside it."""
        # Errors that only one process may have are handled outside of report_once, or none would print them.
        with (
            explain_out_of_memory(self.run.options, self.run.accelerator),
            report_once(self.run.accelerator),
            Interrupts(self.run.accelerator) as interrupts,
        ):
            try:
                with reading(self.run.train_dataloader, self._describe_latest) as batches:
                    self._loop(interrupts, batches)
                return self._finish()
            except NoAnswer:
                self._leave_hung(interrupts)
            finally:
                keep_groups()
                self.log.close()
                self.lock.release()

    def _finish(self) -> dict[str, Any]:
        summary, run = self.saver.finish(), self.run
        with raise_on_all_ranks(run.accelerator):
            if run.accelerator.is_main_process:
                with explain_failure(run.options.output_dir, "results in its card (the LoRA is)"):
                    complete_card(run, self.sampler, self.evaluator.report)
                if run.options.push_to_hub:
                    push(run.options.output_dir, run.options.push_to_hub)
        return summary

    def _describe_latest(self) -> str:
        return describe_latest(self.run.options.output_dir)

    def _loop(self, interrupts: Interrupts, batches: Iterator[MicroBatch]) -> None:
        run, plan, progress = self.run, self.run.plan, self.run.progress
        began = time.perf_counter()
        if plan.first_step == 0:
            self.evaluator.before_first_step()
            self.sampler.before_first_step()
        if run.random_states is not None:
            restore_random_state(run.accelerator, run.random_states)
        run.model.train()
        with self._progress_bar() as bar:
            for step in range(plan.first_step, plan.total_steps):
                if progress.stopped_early:
                    break
                started, rate = time.perf_counter(), run.lr_scheduler.get_last_lr()[0]
                # The loader yields this process's micro-batches in the plan's order.
                micro_batches = [next(batches) for _ in plan.micro_batches(step)]
                with self.compilation.explaining() if self.compilation else nullcontext():
                    loss, grad_norm = self.update(micro_batches)
                seconds = time.perf_counter() - started
                progress.global_step = step + 1
                progress.seconds += seconds
                if self.compilation:
                    self.compilation.after_step(seconds)
                values = {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
                self.log.write(step + 1, plan.epoch_of(step), values)
                bar.update(f"loss {loss:.4f}, lr {rate:.1e}")
                self.evaluator.after_step(step)
                self.sampler.after_step(step)
                # Measured before the save, so that it is in the checkpoint. The save counts to the next step.
                progress.wall_seconds += time.perf_counter() - began
                began = time.perf_counter()
                self.saver.after_step(step)
                if interrupts.agreed():
                    interrupts.leave(self.saver.save_interrupted())

    def update(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Take one optimizer step.

        The mean loss of each micro-batch is weighed by its number of tokens. So the gradient is that of the
        mean over the whole effective batch, however it is divided into micro-batches and processes.

        Args:
            micro_batches: this process's micro-batches of the step.

        Returns:
            The loss per token over all processes, and the norm of the gradient.
        """
        run, accelerator = self.run, self.run.accelerator
        tokens, losses = self._count(micro_batches), []
        for index, micro_batch in enumerate(micro_batches):
            with accumulate(accelerator, run.model, last=index == len(micro_batches) - 1):
                with run.encoding(micro_batch.inputs) as inputs:
                    inputs = move_batch(inputs, accelerator.device, self.dtype)
                    loss = run.model(**inputs).loss.float()
                loss = loss * (micro_batch.label_tokens / max(tokens, 1))
                losses.append(loss.detach())
                # DistributedDataParallel averages gradients over processes, but here the sum is needed.
                accelerator.backward(loss * accelerator.num_processes)
        # Without tokens, no image of this step could be read, so there is no loss.
        loss = accelerator.reduce(torch.stack(losses).sum()).item() if tokens else math.nan
        grad_norm = float(accelerator.clip_grad_norm_(self.parameters, run.options.max_grad_norm or math.inf))
        self._step(micro_batches, loss, grad_norm)
        return loss, grad_norm

    def _step(self, micro_batches: Sequence[MicroBatch], loss: float, grad_norm: float) -> None:
        run, scaled = self.run, self.run.accelerator.scaler is not None
        good = self.health.is_good(loss, grad_norm)
        if not good:
            # Without a loss, gradients may be zero and finite, and fp16's scaler would take the step.
            run.optimizer.zero_grad()
        # Under fp16, overflows are normal: the scaler skips the step by itself and lowers its scale.
        if good or scaled:
            with self.heap.stepping():
                run.optimizer.step()
        if good and not run.optimizer.step_was_skipped:
            run.progress.last_loss = loss
            self.health.check_alive()
            run.lr_scheduler.step()
            self.health.note_good(loss, micro_batches)
        else:
            overflow = scaled and math.isfinite(loss) and run.accelerator.scaler.get_scale() >= LEAST_SCALE
            self.health.note_bad(loss, micro_batches, overflow)
        run.optimizer.zero_grad()
        self.heap.stepped()

    def _count(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Record images read and left out in this step on all processes; return how many label tokens."""
        accelerator, progress = self.run.accelerator, self.run.progress
        errors = [error for m in micro_batches for error in m.errors]
        tokens, images = sum(m.label_tokens for m in micro_batches), sum(len(m.files) for m in micro_batches)
        counts = torch.tensor([tokens, images, len(errors)], device=accelerator.device)
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(counts)
        tokens, images, failed = counts.tolist()
        for error in progress.note_errors(gather_object(errors)) if failed else ():
            print_once(accelerator, f"skipped {error}")
        progress.images += images
        return tokens

    def _leave_hung(self, interrupts: Interrupts) -> None:
        """Save and leave after a signal, although a worker does not answer: the last step is complete."""
        if self.run.accelerator.num_processes == 1:
            interrupts.leave(self.saver.save_interrupted())
        # Saving needs all processes, and the others wait for this one in the middle of their step.
        error = ProcessError(
            f"{signal.Signals(interrupts.number).name}: a process that reads images does not answer; "
            + self._describe_latest()
        )
        error.exit_code = 128 + interrupts.number
        raise error

    def _progress_bar(self) -> ProgressBar:
        plan, shown = self.run.plan, self.run.accelerator.is_local_main_process
        return ProgressBar(plan.total_steps, "training", "step", initial=plan.first_step, shown=shown)

"""The training loop. It knows no family: a batch has a loss, and that is all it asks for."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from caption_train.accelerator import accumulate
from caption_train.collate import find_dtype, move_batch
from caption_train.dataset import MicroBatch
from caption_train.errors import CaptionTrainError
from caption_train.evaluation import Sampler
from caption_train.interrupts import Interrupts
from caption_train.lora import copy_lora_b, find_dead_modules
from caption_train.run import Run
from caption_train.saving import Saver
from caption_train.tracking import RunLog


class Trainer:
    """Trains a `Run`, from where its progress stands to the end of its plan."""

    def __init__(self, run: Run, sampler: Sampler, saver: Saver, log: RunLog) -> None:
        self.run, self.sampler, self.saver, self.log = run, sampler, saver, log
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        self.dtype = find_dtype(run.model)
        self.untried = copy_lora_b(run.model) if run.progress.global_step == 0 else {}

    def train(self) -> dict[str, Any]:
        """Run the loop, save the LoRA to `output_dir`, and return the summary saved beside it."""
        run, plan = self.run, self.run.plan
        batches, started, images = iter(run.train_dataloader), time.perf_counter(), 0
        if plan.first_step == 0:
            self.sampler.before_first_step()
        run.model.train()
        with Interrupts(run.accelerator) as interrupts, self._progress_bar() as bar:
            for step in range(plan.first_step, plan.total_steps):
                micro_batches = [next(batches) for _ in plan.micro_batches(step)]
                images += sum(len(m.files) for m in micro_batches)
                rate = run.lr_scheduler.get_last_lr()[0]
                loss, grad_norm = self.update(micro_batches)
                run.progress.advance(loss)
                values = {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
                self.log.write(step + 1, plan.epoch_of(step), values)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2e}", refresh=False)
                bar.update()
                self.sampler.after_step(step)
                self.saver.after_step(step)
                if interrupts.agreed():
                    self.saver.save(f"step-{step + 1:06d}-interrupted")
                    interrupts.leave(run.options.output_dir)
        return self.saver.finish(images=images, seconds=time.perf_counter() - started)

    def update(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Take one optimizer step; return the loss over its tokens on all processes, and the gradient's norm.

        Each micro-batch's mean loss weighs as many tokens as it has, so the gradient is that of the mean over
        the whole effective batch, however it is cut into micro-batches and processes.
        """
        run, accelerator = self.run, self.run.accelerator
        total = self._count_tokens(micro_batches)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            with accumulate(accelerator, run.model, last=index == len(micro_batches) - 1):
                inputs = move_batch(micro_batch.inputs, accelerator.device, self.dtype)
                loss = run.model(**inputs).loss.float()
                loss = loss * (micro_batch.label_tokens / total)
                losses.append(loss.detach())
                # DistributedDataParallel takes the mean over processes where the sum is meant.
                accelerator.backward(loss * accelerator.num_processes)
        loss = accelerator.reduce(torch.stack(losses).sum()).item()
        grad_norm = float(accelerator.clip_grad_norm_(self.parameters, run.options.max_grad_norm or math.inf))
        self._step(micro_batches, loss, grad_norm)
        return loss, grad_norm

    def _count_tokens(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Return how many label tokens this optimizer step has on all processes, 1 if there is none."""
        count, accelerator = sum(m.label_tokens for m in micro_batches), self.run.accelerator
        if accelerator.num_processes > 1:
            count = accelerator.reduce(torch.tensor(count, device=accelerator.device)).item()
        return max(count, 1)

    def _step(self, micro_batches: Sequence[MicroBatch], loss: float, grad_norm: float) -> None:
        run, scaled = self.run, self.run.accelerator.scaler is not None
        run.progress.note_errors(error for m in micro_batches for error in m.errors)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        # Under fp16 an overflow is ordinary: the scaler skips the step itself and lowers its scale.
        if finite or scaled:
            run.optimizer.step()
        if finite and not run.optimizer.step_was_skipped:
            self._check_alive()
            run.lr_scheduler.step()
            run.progress.bad_steps = 0
        else:
            run.progress.skipped_steps += 1
            run.progress.bad_steps += not (scaled and math.isfinite(loss))
            self._stop_when_bad(micro_batches, loss)
        run.optimizer.zero_grad()

    def _check_alive(self) -> None:
        """Stop when a LoRA module did not move at the first step: it never would, and nobody would know."""
        if not self.untried or self.run.lr_scheduler.get_last_lr()[0] == 0:
            return
        dead = find_dead_modules(self.run.model, self.untried)
        self.untried = {}
        if dead:
            raise CaptionTrainError(
                f"--target_modules: {len(dead)} LoRA modules get no gradient and would stay untrained: "
                + ", ".join(dead)
            )

    def _stop_when_bad(self, micro_batches: Sequence[MicroBatch], loss: float) -> None:
        progress, most = self.run.progress, self.run.options.max_bad_steps
        if progress.bad_steps < most:
            return
        files = ", ".join(file for m in micro_batches for file in m.files)
        raise CaptionTrainError(
            f"--max_bad_steps: loss or gradient was not finite {most} times in a row (loss {loss}; last "
            f"files: {files}); lower --learning_rate or set --max_grad_norm; {self.saver.describe_last()}"
        )

    def _progress_bar(self) -> tqdm:
        plan, accelerator = self.run.plan, self.run.accelerator
        return tqdm(
            total=plan.total_steps,
            initial=plan.first_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )

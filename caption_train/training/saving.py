"""Decides when a run saves, and saves checkpoints, `last`, `best` and the finished LoRA."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from caption_train.adapters.lora import save_adapter
from caption_train.adapters.model_card import write_card
from caption_train.errors import CaptionTrainError
from caption_train.system.files import follow_pointer, write_atomically
from caption_train.system.memory import peak_memory
from caption_train.training.checkpoints.find import BEST, LAST, count_saves
from caption_train.training.checkpoints.state import capture_random_state, write_state
from caption_train.training.checkpoints.store import explain_failure, prune, publish, write_checkpoint
from caption_train.training.distributed.fsdp import gather_state, gather_weights
from caption_train.training.distributed.ranks import raise_on_all_ranks
from caption_train.training.monitor.curve import draw_curve
from caption_train.training.run.batch_plan import is_due
from caption_train.training.run.run import TrainingRun

SUMMARY_FILE = "summary.json"


class CheckpointSaver:
    """Saves a run. Without a `--save_every_…` it saves every epoch, and keeps only the newest checkpoint."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.output_dir = run.options.output_dir
        self.saved_step = run.plan.first_step
        with raise_on_all_ranks(run.accelerator):
            if run.accelerator.is_main_process:
                self._check_room()

    def after_step(self, step: int) -> None:
        """Save if it is due after this 0-based optimizer step, if this is the best so far, or the last."""
        options, plan, done = self.run.options, self.run.plan, step + 1
        progress, epoch = self.run.progress, plan.epoch_of(step)
        ends_epoch = done % plan.steps_per_epoch == 0
        every_epochs = options.save_every_n_epochs
        if not (every_epochs or options.save_every_n_steps):
            every_epochs = 1
        is_best = progress.best_step == done
        is_last = done == plan.total_steps or progress.stopped_early
        if ends_epoch and (is_due(every_epochs, epoch) or is_last):
            self.save(f"epoch-{epoch:04d}{self._suffix()}", is_best)
        elif is_due(options.save_every_n_steps, done) or is_best or is_last:
            self.save(f"step-{done:06d}{self._suffix()}", is_best)

    def save(self, name: str, is_best: bool = False) -> None:
        """Write the checkpoint `output_dir/name`, which can be loaded as an adapter and resumed as a run.

        The run's `--name` is put before `name`, so that checkpoints of several runs can be moved to one
        folder.

        Args:
            name: the folder name of the checkpoint.
            is_best: whether `best` shall point to it too.
        """
        run = self.run
        name = f"{run.options.name}-{name}" if run.options.name else name
        run.progress.total_steps = run.plan.total_steps
        run.progress.peak_memory_bytes = self._find_peak()
        random_states = capture_random_state(run.accelerator)
        optimizer_state = gather_state(run.accelerator, run.optimizer.state_dict())
        weights = gather_weights(run.accelerator, run.model)
        with raise_on_all_ranks(run.accelerator):
            if run.accelerator.is_main_process:
                run.progress.saves = count_saves(self.output_dir) + 1
                pointers = (LAST, BEST) if is_best else (LAST,)
                write_checkpoint(
                    self.output_dir,
                    name,
                    lambda folder: self._write(folder, weights, optimizer_state, random_states),
                    *pointers,
                )
                self._prune()
        self.saved_step = run.progress.global_step

    def save_interrupted(self) -> Path:
        """Save the current step, unless it was saved just now; return the checkpoint."""
        if self.saved_step != self.run.progress.global_step:
            self.save(f"step-{self.run.progress.global_step:06d}-interrupted")
        return self.output_dir / LAST

    def finish(self) -> dict[str, Any]:
        """Copy the finished LoRA to `output_dir`, write the summary beside it, and return the summary."""
        run, progress = self.run, self.run.progress
        summary = {
            "global_step": progress.global_step,
            "epochs": run.plan.epoch_of(max(progress.global_step - 1, 0)),
            "loss": progress.last_loss,
            "loss_running_mean": progress.loss_mean,
            **_finite("base_", progress.base_evaluation),
            **_finite("validation_", progress.evaluation),
            "best_step": progress.best_step,
            f"best_{run.options.metric_for_best}": progress.best_value,
            "stopped_early": progress.stopped_early,
            "images": progress.images,
            "images_per_second": round(progress.images / max(progress.seconds, 1e-9), 3),
            "train_seconds": round(progress.seconds, 1),
            "wall_seconds": round(progress.wall_seconds, 1),
            "peak_memory_bytes": self._find_peak(),
            "skipped_steps": progress.skipped_steps,
            "skipped_files": list(progress.skipped_files.values()),
        }
        with raise_on_all_ranks(run.accelerator):
            if run.accelerator.is_main_process:
                chosen = BEST if run.options.load_best_at_end and progress.best_step else LAST
                publish(follow_pointer(self.output_dir / chosen), self.output_dir)
                with explain_failure(self.output_dir, f"{SUMMARY_FILE} (the LoRA is)"):
                    write_atomically(self.output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
                    draw_curve(self.output_dir, progress.best_step, run.options.metric_for_best)
        return summary

    def _check_room(self) -> None:
        """Refuse a disk without space for one checkpoint now, not at the end of the first epoch."""
        options = self.run.options
        trained = [p for p in self.run.model.parameters() if p.requires_grad]
        saved = trained if options.train_method == "lora" else list(self.run.model.parameters())
        needed = sum(p.numel() * p.element_size() for p in saved)
        needed += 8 * sum(p.numel() for p in trained) if options.optimizer_name == "AdamW" else 0
        free = shutil.disk_usage(self.output_dir).free
        if free < needed:
            raise CaptionTrainError(
                f"--output_dir {self.output_dir}: {free / 1e6:,.1f} MB free, one checkpoint takes more than "
                f"{needed / 1e6:,.1f} MB; make room or choose another folder"
            )

    def _suffix(self) -> str:
        loss = self.run.progress.last_loss
        return "" if loss is None else f"-loss-{loss:.4f}"

    def _find_peak(self) -> int:
        peaks = gather_object([peak_memory(self.run.accelerator.device)])
        return max(*peaks, self.run.progress.peak_memory_bytes)

    def _prune(self) -> None:
        options = self.run.options
        asked = options.save_every_n_steps or options.save_every_n_epochs
        keep = options.keep_last or (None if asked else 1)
        if keep is not None:
            pointed = (follow_pointer(self.output_dir / name) for name in (LAST, BEST))
            protected = [self.output_dir / checkpoint.name for checkpoint in pointed]
            prune(self.output_dir, self.run.progress.run_id, keep, protected)

    def _write(
        self,
        folder: Path,
        weights: dict[str, Any] | None,
        optimizer_state: dict[str, Any],
        random_states: list[dict[str, Any]],
    ) -> None:
        run, progress = self.run, self.run.progress
        model = run.accelerator.unwrap_model(run.model)
        if run.options.train_method == "lora":
            save_adapter(model, folder, weights)
        else:
            model.save_pretrained(folder, state_dict=weights)
        run.processor.save_pretrained(folder)
        epoch = run.plan.epoch_of(max(progress.global_step - 1, 0))
        reached = {"global_step": progress.global_step, "epoch": epoch, "loss": progress.last_loss}
        write_card(folder, run.record, reached)
        write_state(
            folder, progress, optimizer_state, run.lr_scheduler, run.accelerator.scaler, random_states
        )


def _finite(prefix: str, values: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no not-a-number, which validation returns if no image could be read.
    return {f"{prefix}{name}": value if math.isfinite(value) else None for name, value in values.items()}

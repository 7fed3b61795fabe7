"""When a run saves, and what: checkpoints, `last`, and the finished LoRA in `output_dir` itself."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from caption_train.checkpoint import find_latest, point, prune, publish, write_checkpoint
from caption_train.files import write_atomically
from caption_train.model_card import write_card
from caption_train.resume import capture_random_state, write_state
from caption_train.run import Run

SUMMARY_FILE = "summary.json"


class Saver:
    """Saves a run. Unless a `--save_every_…` asks for more it saves every epoch and keeps the newest only."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.output_dir = run.options.output_dir

    def after_step(self, step: int) -> None:
        """Save if the 0-based optimizer step just taken is due."""
        options, plan, done = self.run.options, self.run.plan, step + 1
        epoch, ends_epoch = plan.epoch_of(step), done % plan.steps_per_epoch == 0
        every_epochs = options.save_every_n_epochs
        if not (every_epochs or options.save_every_n_steps):
            every_epochs = 1
        loss = self.run.progress.last_loss
        if ends_epoch and is_due(every_epochs, epoch):
            self.save(f"epoch-{epoch:04d}-loss-{loss:.4f}")
        elif is_due(options.save_every_n_steps, done):
            self.save(f"step-{done:06d}-loss-{loss:.4f}")
        elif done == plan.total_steps:
            self.save(f"epoch-{epoch:04d}-loss-{loss:.4f}")

    def save(self, name: str) -> None:
        """Write the checkpoint `output_dir/name`, which loads as an adapter and resumes as a run."""
        run, options = self.run, self.run.options
        random_states = capture_random_state(run.accelerator)
        if run.accelerator.is_main_process:
            write_checkpoint(self.output_dir, name, lambda folder: self._write(folder, random_states))
            point(self.output_dir, "last", self.output_dir / name)
            asked = options.save_every_n_steps or options.save_every_n_epochs
            keep = options.keep_last or (None if asked else 1)
            if keep is not None:
                prune(self.output_dir, keep)
        run.accelerator.wait_for_everyone()

    def finish(self, *, images: int, seconds: float) -> dict[str, Any]:
        """Put the last checkpoint's LoRA into `output_dir` and write the summary beside it; return that."""
        run, progress = self.run, self.run.progress
        images = int(run.accelerator.reduce(torch.tensor(images, device=run.accelerator.device)).item())
        summary = {
            "global_step": progress.global_step,
            "epochs": run.options.epochs,
            "loss": progress.last_loss,
            "images": images,
            "images_per_second": round(images / seconds, 3),
            "train_seconds": round(seconds, 1),
            "peak_memory_bytes": peak_memory(run.accelerator.device),
            "skipped_steps": progress.skipped_steps,
            "skipped_files": list(progress.skipped_files.values()),
        }
        if run.accelerator.is_main_process:
            publish((self.output_dir / "last").resolve(), self.output_dir)
            write_atomically(self.output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        run.accelerator.wait_for_everyone()
        return summary

    def describe_last(self) -> str:
        """Say which checkpoint can be gone back to."""
        checkpoint, _ = find_latest(self.output_dir)
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved yet"

    def _write(self, folder: Path, random_states: list[dict[str, Any]]) -> None:
        run, progress = self.run, self.run.progress
        model = run.accelerator.unwrap_model(run.model)
        if run.options.train_method == "lora":
            # Without this PEFT asks the hub whether the vocabulary grew.
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            model.save_pretrained(folder)
        run.processor.save_pretrained(folder)
        epoch = run.plan.epoch_of(max(progress.global_step - 1, 0))
        reached = {"global_step": progress.global_step, "epoch": epoch, "loss": progress.last_loss}
        write_card(folder, run.record, reached)
        write_state(folder, progress, run.optimizer, run.lr_scheduler, run.accelerator.scaler, random_states)


def is_due(every: int | None, count: int) -> bool:
    """Return whether something done every so often (never, if None) is due at this count."""
    return every is not None and count % every == 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

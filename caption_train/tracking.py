"""Where a run's numbers go: `log.jsonl` in the output folder, and the trackers the user asked for."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator

from caption_train.errors import CaptionTrainError
from caption_train.files import write_atomically
from caption_train.progress import Progress

if TYPE_CHECKING:
    from caption_train.previews import Sample

LOG_FILE = "log.jsonl"


class RunLog:
    """One line of JSON per optimizer step, and the same values to the trackers; main process only."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int = 0) -> None:
        self.accelerator = accelerator
        self.file = None
        if accelerator.is_main_process:
            path = output_dir / LOG_FILE
            write_atomically(path, "".join(_lines_before(path, first_step)))
            self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values of an optimizer step (counted from 1)."""
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            try:
                self.file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
            except OSError as error:
                raise CaptionTrainError(f"{self.file.name}: {error.strerror}") from error
        self.accelerator.log({**values, "epoch": epoch}, step=step)

    def write_samples(self, step: int, samples: Sequence["Sample"]) -> None:
        """Log sample captions, each with its image, to the trackers."""
        for tracker in self.accelerator.trackers:
            for index, sample in enumerate(samples):
                label = f"samples/{index}"
                text = f"reference: {sample.reference}\n\ngenerated: {sample.generated}"
                if tracker.name == "tensorboard":
                    tracker.writer.add_image(label, np.asarray(sample.image), step, dataformats="HWC")
                    tracker.writer.add_text(label, text, step)
                elif tracker.name == "wandb":
                    import wandb

                    tracker.log({label: wandb.Image(sample.image, caption=text)}, step=step)

    def close(self) -> None:
        """End the log and the trackers' runs."""
        if self.file is not None:
            self.file.close()
        self.accelerator.end_training()


def start_trackers(
    accelerator: Accelerator, name: str, config: Mapping[str, Any], progress: Progress
) -> None:
    """Start the trackers of `--log_with`, or go on with what they have of this run up to its step."""
    # TensorBoard takes only numbers, text and truth as settings.
    simple = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    settings = {
        "wandb": {"name": name, "id": progress.run_id, "resume": "allow"},
        "tensorboard": {"purge_step": progress.global_step + 1},
    }
    accelerator.init_trackers("caption-train", simple, settings)


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Return the log's lines up to the step that a resumed run starts after."""
    if not path.exists() or first_step == 0:
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]

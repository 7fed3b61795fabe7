"""Where a run's numbers go: `log.jsonl` in the output folder, and the trackers the user asked for."""

import errno
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from caption_train.system.files import parse_json, write_atomically
from caption_train.training.checkpoints.store import explain_failure

LOG_FILE = "log.jsonl"


class RunLog:
    """One line of JSON per optimizer step, and the same values to the trackers; main process only."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int = 0) -> None:
        self.accelerator = accelerator
        self.path = output_dir / LOG_FILE
        self.file: io.FileIO | None = None
        if accelerator.is_main_process:
            with explain_failure(output_dir, LOG_FILE):
                write_atomically(self.path, "".join(_lines_before(self.path, first_step)))
                # Unbuffered: what could not be written now would fail once more when it is closed.
                self.file = self.path.open("ab", buffering=0)

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values of an optimizer step (counted from 1)."""
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            line = (json.dumps({"step": step, "epoch": epoch, **finite}) + "\n").encode()
            with explain_failure(self.path.parent, LOG_FILE):
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Return the log's lines up to the step that a resumed run starts after."""
    if not path.exists() or first_step == 0:
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and 0 < _step_of(line) <= first_step]


def _step_of(line: str) -> int:
    """Return a line's step; 0 for what is none of ours, as a power cut leaves it."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


@dataclass(frozen=True)
class Sample:
    """A fixed image's reference caption and what the model says now."""

    file: str
    image: Image.Image
    reference: str
    generated: str

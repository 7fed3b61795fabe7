"""Writes a run's numbers to `log.jsonl` in the output folder and to the trackers."""

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
    """Writes one line of JSON per optimizer step, and the same values to the trackers.

    Args:
        accelerator: only its main process writes.
        output_dir: the folder of the log.
        first_step: the step that a resumed run continues from; later lines of the log are removed.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int = 0) -> None:
        self.accelerator = accelerator
        self.path = output_dir / LOG_FILE
        self.file: io.FileIO | None = None
        if accelerator.is_main_process:
            with explain_failure(output_dir, LOG_FILE):
                write_atomically(self.path, "".join(_lines_before(self.path, first_step)))
                # Unbuffered: data that could not be written would raise again when the file is closed.
                self.file = self.path.open("ab", buffering=0)

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values of an optimizer step, which is counted from 1."""
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            line = (json.dumps({"step": step, "epoch": epoch, **finite}) + "\n").encode()
            with explain_failure(self.path.parent, LOG_FILE):
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.accelerator.log({**values, "epoch": epoch}, step=step)

    def write_samples(self, step: int, samples: Sequence["Sample"]) -> None:
        """Log preview captions, each with its image, to the trackers."""
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
        """Close the log, and end the run in the trackers."""
        if self.file is not None:
            self.file.close()
        self.accelerator.end_training()


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Return the lines of the log up to the step that a resumed run continues from."""
    if not path.exists() or first_step == 0:
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and 0 < _step_of(line) <= first_step]


def _step_of(line: str) -> int:
    """Return a line's step, or 0 for a line that is broken, for example by a power cut."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


@dataclass(frozen=True)
class Sample:
    """A preview: an image's reference caption and what the model generates now."""

    file: str
    image: Image.Image
    reference: str
    generated: str

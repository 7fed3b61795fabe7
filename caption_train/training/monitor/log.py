"""Writes a run's numbers to `log.jsonl` in the output folder and to the trackers."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from caption_train.system.files import (
    AppendedRows,
    copy_atomically,
    find_free_name,
    parse_json,
    read_regular_file,
    write_atomically,
)
from caption_train.training.checkpoints.find import find_last_run
from caption_train.training.checkpoints.store import explain_failure

LOG_FILE = "log.jsonl"
_MOST_BYTES = 4 << 30


class RunLog:
    """Writes one line of JSON per optimizer step, and the same values to the trackers.

    A new run in the folder of an earlier one sets that one's log aside; see `set_log_aside`.

    Args:
        accelerator: only its main process writes.
        output_dir: the folder of the log.
        first_step: the step that a resumed run continues from; later lines of the log are removed.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int = 0) -> None:
        self.accelerator = accelerator
        self.path = output_dir / LOG_FILE
        self.file: AppendedRows | None = None
        if accelerator.is_main_process:
            with explain_failure(output_dir, LOG_FILE):
                if first_step == 0:
                    set_log_aside(output_dir)
                write_atomically(self.path, "".join(_lines_before(self.path, first_step)))
                self.file = AppendedRows(self.path)

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values of an optimizer step, which is counted from 1; step 0 is the untrained model's."""
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with explain_failure(self.path.parent, LOG_FILE):
                self.file.append({"step": step, "epoch": epoch, **finite})
        self.accelerator.log({**values, "epoch": epoch}, step=step)

    def write_samples(self, step: int, samples: Sequence["Sample"], *, with_images: bool = True) -> None:
        """Log preview captions to the trackers, each with its image unless that is to stay here."""
        for tracker in self.accelerator.trackers:
            for index, sample in enumerate(samples):
                label = f"samples/{index}"
                text = f"reference: {sample.reference}\n\ngenerated: {sample.generated}"
                if tracker.name == "tensorboard":
                    if with_images:
                        tracker.writer.add_image(label, np.asarray(sample.image), step, dataformats="HWC")
                    tracker.writer.add_text(label, text, step)
                elif tracker.name == "wandb":
                    import wandb

                    image = wandb.Image(sample.image, caption=text) if with_images else None
                    tracker.log({label: image or wandb.Html(escape(text))}, step=step)

    def close(self) -> None:
        """Close the log, and end the run in the trackers."""
        if self.file is not None:
            self.file.close()
        self.accelerator.end_training()


def set_log_aside(output_dir: Path) -> None:
    """Rename the log of an earlier run to `log-RUN_ID.jsonl`, or to one with its date if its run is unknown.

    Raises:
        OSError: the log cannot be renamed.
    """
    path = output_dir / LOG_FILE
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink()) or not path.lstat().st_size:
        return
    aside = _path_aside(output_dir, find_last_run(output_dir) or "")
    # The run may have been killed before its first checkpoint; then `last` leads to a run before it.
    if aside is None or os.path.lexists(aside):
        written = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        aside = find_free_name(output_dir / f"log-{written:%Y%m%d-%H%M%S}.jsonl")
    path.rename(aside)


def bring_log_back(output_dir: Path, run_id: str, source: Path) -> None:
    """Make `log.jsonl` the log of a run that is resumed. Call it before `last` points to that run.

    Args:
        output_dir: the folder of the log.
        run_id: the run that is resumed.
        source: the folder of its checkpoint, perhaps another one, where its log is too.

    Raises:
        OSError: a log cannot be read or renamed.
    """
    path, aside = output_dir / LOG_FILE, _path_aside(source, run_id)
    is_aside = aside is not None and aside.is_file()
    is_others = find_last_run(output_dir) not in (run_id, None)
    if source.resolve() == output_dir.resolve():
        if is_aside or is_others:
            set_log_aside(output_dir)
        if is_aside:
            aside.rename(path)
        return
    if is_others:
        set_log_aside(output_dir)
    if is_aside or (source / LOG_FILE).is_file():
        copy_atomically(aside if is_aside else source / LOG_FILE, path)


def _path_aside(output_dir: Path, run_id: str) -> Path | None:
    # The id comes from a file that anybody may have written.
    return output_dir / f"log-{run_id}.jsonl" if re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII) else None


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Return the lines of the log up to the step that a resumed run continues from.

    Raises:
        OSError: the log is a link, a folder or a pipe, or cannot be read.
    """
    if not os.path.lexists(path) or first_step == 0:
        return []
    text = read_regular_file(path, _MOST_BYTES, is_own=True).decode("utf-8", "replace")
    lines = text.splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and 0 <= _step_of(line) <= first_step]


def _step_of(line: str) -> int:
    """Return a line's step, or -1 for a line that is broken, for example by a power cut."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


@dataclass(frozen=True)
class Sample:
    """A preview: an image's reference caption and what the model generates now."""

    file: str
    image: Image.Image
    reference: str
    generated: str

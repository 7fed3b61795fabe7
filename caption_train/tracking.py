"""Where a run's numbers go: `log.jsonl` in the output folder, and the trackers the user asked for."""

import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator

from caption_train.checkpoint import explain_failure
from caption_train.errors import UsageError
from caption_train.files import write_atomically
from caption_train.progress import Progress

if TYPE_CHECKING:
    from caption_train.previews import Sample

LOG_FILE = "log.jsonl"
_LOGIN = "run `wandb login`, or set WANDB_MODE=offline"


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


def check_trackers(log_with: str | None) -> None:
    """Raise UsageError when the tracker of `--log_with` is not installed or not logged in to."""
    packages = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}.get(log_with, ())
    if packages and not any(map(find_spec, packages)):
        raise UsageError(f"--log_with {log_with}: not installed; pip install {packages[0]}")
    if log_with in ("wandb", "all") and find_spec("wandb"):
        with _explain_login():
            _check_login()


def _check_login() -> None:
    import wandb

    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.login(prompt=False):
        raise UsageError(f"--log_with wandb: no login; {_LOGIN}")


@contextmanager
def _explain_login() -> Iterator[None]:
    """Turn what wandb raises into one line."""
    try:
        yield
    except Exception as error:
        # wandb's own, which must not be imported to be caught: it may be absent.
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--log_with wandb: {reason}; {_LOGIN}") from error


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
    with _explain_login():
        # Settings told again would be one more run to TensorBoard.
        accelerator.init_trackers("caption-train", None if progress.global_step else simple, settings)


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Return the log's lines up to the step that a resumed run starts after."""
    if not path.exists() or first_step == 0:
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and 0 < _step_of(line) <= first_step]


def _step_of(line: str) -> int:
    """Return a line's step; 0 for what is none of ours, as a power cut leaves it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0

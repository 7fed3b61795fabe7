"""Starts TensorBoard and Weights & Biases, and checks the login before a run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.training.checkpoints.progress import Progress

PROJECT = "caption-train"
"""The project's name in wandb, and TensorBoard's folder in the output folder."""
WANDB_DIR = "WANDB_DIR"
"""An environment variable: another place than the output folder for wandb's records."""
_LOGIN = "run `wandb login`, or set WANDB_MODE=offline"


def check_trackers(log_with: str | None, output_dir: Path) -> None:
    """Raise UsageError if the tracker of `--log_with` is not installed, not logged in, or cannot write.

    Args:
        log_with: the flag.
        output_dir: their records go into folders there, which must be no links out of it.
    """
    packages = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}.get(log_with, ())
    if packages and not any(map(find_spec, packages)):
        raise UsageError(f"--log_with {log_with}: not installed; pip install {packages[0]}")
    if log_with in ("wandb", "all") and find_spec("wandb"):
        with _explain_failure():
            _check_login()
    folders = {"TensorBoard": output_dir / PROJECT} if log_with in ("tensorboard", "all") else {}
    if log_with in ("wandb", "all") and WANDB_DIR not in os.environ:
        folders["wandb"] = output_dir / "wandb"
    for name, records in folders.items():
        if records.is_symlink() or (records.exists() and not records.is_dir()):
            kind = "a link" if records.is_symlink() else "no folder"
            raise UsageError(
                f"--log_with {log_with}: {records} is {kind}, where {name}'s records go: move it away"
            )


def _check_login() -> None:
    import wandb

    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and not wandb.login(prompt=False):
        raise UsageError(f"--log_with wandb: no login; {_LOGIN}")


@contextmanager
def _explain_failure() -> Iterator[None]:
    """Turn errors of wandb, and of the disk, into one line."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or 'its records'}: {error.strerror or error}"
        raise CaptionTrainError(f"--log_with: cannot be started: {reason}") from error
    except Exception as error:
        # Compared by name, because wandb may not be installed, so its errors cannot be imported.
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--log_with wandb: {reason}; {_LOGIN}") from error


def start_trackers(
    accelerator: Accelerator, name: str, config: Mapping[str, Any], progress: Progress, output_dir: Path
) -> None:
    """Start the trackers of `--log_with`; a resumed run continues its records up to its step.

    Args:
        accelerator: the accelerator that has the trackers.
        name: the run's name in wandb.
        config: the settings of the run.
        progress: how far the run has come.
        output_dir: where wandb's records go, unless WANDB_DIR says otherwise.

    Raises:
        UsageError, CaptionTrainError: a tracker cannot start.
    """
    # TensorBoard accepts only numbers, strings and booleans as settings.
    simple = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    settings = {
        "wandb": {"name": name, "id": progress.run_id, "resume": "allow"},
        "tensorboard": {"purge_step": progress.global_step + 1},
    }
    if WANDB_DIR not in os.environ:
        # An absolute path, since wandb's own process may stand elsewhere.
        settings["wandb"]["dir"] = str(output_dir.resolve())
    with _explain_failure():
        # TensorBoard shows settings that are written a second time as another run.
        accelerator.init_trackers(PROJECT, None if progress.global_step else simple, settings)

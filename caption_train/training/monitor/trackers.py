"""Starts TensorBoard and Weights & Biases, and checks the login before a run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator

from caption_train.errors import UsageError
from caption_train.training.checkpoints.progress import Progress

_LOGIN = "run `wandb login`, or set WANDB_MODE=offline"


def check_trackers(log_with: str | None) -> None:
    """Raise UsageError if the tracker of `--log_with` is not installed or not logged in."""
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
    """Turn wandb's errors into one line."""
    try:
        yield
    except Exception as error:
        # Compared by name, because wandb may not be installed, so its errors cannot be imported.
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--log_with wandb: {reason}; {_LOGIN}") from error


def start_trackers(
    accelerator: Accelerator, name: str, config: Mapping[str, Any], progress: Progress
) -> None:
    """Start the trackers of `--log_with`; a resumed run continues its records up to its step.

    Args:
        accelerator: the accelerator that has the trackers.
        name: the run's name in wandb.
        config: the settings of the run.
        progress: how far the run has come.
    """
    # TensorBoard accepts only numbers, strings and booleans as settings.
    simple = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    settings = {
        "wandb": {"name": name, "id": progress.run_id, "resume": "allow"},
        "tensorboard": {"purge_step": progress.global_step + 1},
    }
    with _explain_login():
        # TensorBoard shows settings that are written a second time as another run.
        accelerator.init_trackers("caption-train", None if progress.global_step else simple, settings)

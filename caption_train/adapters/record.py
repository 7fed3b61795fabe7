"""What an adapter's or a trained model's folder says of itself, before anything is loaded. No torch."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from caption_train import __version__
from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import name_script

TRAINING_FILE = "training.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "flora-opt", "pillow")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder says of itself; None where it does not say."""

    folder: Path
    base_model: str | None
    family: str | None
    revision: str | None
    prompt: str | None


def read_adapter(folder: Path | str) -> AdapterInfo:
    """Read an adapter's own account of its base from training.json and adapter_config.json; no weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--peft_model {folder}: there is no such folder")
    config = _read_json(folder / "adapter_config.json")
    if config is None and (folder / "config.json").is_file():
        raise UsageError(f"--peft_model {folder}: a full model: use --base_model {folder}")
    if config is None:
        raise UsageError(f"--peft_model {folder}: holds no adapter_config.json, so it is no PEFT adapter")
    training = _read_json(folder / TRAINING_FILE) or {}
    return AdapterInfo(
        folder,
        training.get("base_model") or config.get("base_model_name_or_path"),
        training.get("family"),
        training.get("revision") or config.get("revision"),
        training.get("prompt"),
    )


def read_base_prompt(base_model: str, family: str) -> str | None:
    """Return the prompt that a model in a local folder was trained with, None where nothing is said.

    Raises UsageError when it is of another family.
    """
    training = _read_json(Path(base_model) / TRAINING_FILE) or {}
    _check_family(f"--base_model {base_model}", training.get("family"), family)
    return training.get("prompt")


def check_base(adapter: AdapterInfo, family: str, base_model: str, base_models: Iterable[str]) -> None:
    """Raise UsageError when the adapter was trained on another base than `base_model`, before anything loads.

    A base that is a folder may have been moved, so only two ids of the hub are known to differ.
    """
    _check_family(f"--peft_model {adapter.folder}", adapter.family, family)
    if base_model == adapter.base_model and Path(base_model).is_absolute() and not Path(base_model).is_dir():
        raise UsageError(
            f"--peft_model {adapter.folder}: trained on {base_model}, which is gone; give --base_model"
        )
    known = set(base_models)
    if adapter.base_model in known and base_model in known and adapter.base_model != base_model:
        raise UsageError(
            f"--peft_model {adapter.folder}: trained on {adapter.base_model}, not --base_model {base_model}"
        )


def _check_family(what: str, trained: str | None, family: str) -> None:
    if trained not in (None, family):
        raise UsageError(
            f"{what}: trained on {trained}, not on {family}; caption with {name_script(trained)}"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CaptionTrainError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CaptionTrainError(f"{path}: holds no JSON object")
    return content


@dataclass
class TrainingRecord:
    """Where a LoRA or a model comes from: enough to load it, to resume it, and to refuse the wrong base."""

    family: str
    base_model: str
    revision: str | None
    prompt: str
    options: dict[str, Any]
    dataset: dict[str, Any]
    versions: dict[str, str]
    base_fingerprint: str | None = None
    base_commit: str | None = None
    trainable_parameters: int = 0
    total_parameters: int = 0

    def to_json(self, **extra: Any) -> str:
        """Return training.json's text, with `extra` (step, epoch, loss) beside the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(values | extra, indent=2, ensure_ascii=False) + "\n"


def find_versions() -> dict[str, str]:
    """Return the versions of all that can change a run's numbers."""
    versions = {"caption-train": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options by name, paths as text."""
    values = {f.name: getattr(options, f.name) for f in fields(options) if "help" in f.metadata}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

"""Reads and writes what the folder of an adapter or a trained model says about itself. No torch.

The folder of a LoRA:

    my-lora/
    ├── adapter_config.json        PEFT: rank, target modules, base model
    ├── adapter_model.safetensors  the weights of the LoRA
    ├── training.json              TrainingRecord: family, base model, prompt, options, dataset, versions
    ├── README.md                  the model card
    ├── processor_config.json      processor and tokenizer, as in the base
    └── tokenizer.json, tokenizer_config.json
"""

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
from caption_train.families.base import Family, ModelFacts

TRAINING_FILE = "training.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "flora-opt", "pillow")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder says about itself; None for what it does not say."""

    folder: Path
    base_model: str | None
    family: str | None
    revision: str | None
    prompt: str | None


def read_adapter(folder: Path | str) -> AdapterInfo:
    """Read training.json and adapter_config.json of an adapter, without its weights.

    Raises:
        UsageError: there is no such folder, or it holds no PEFT adapter.
        CaptionTrainError: one of the files is damaged.
    """
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


@dataclass(frozen=True)
class Base:
    """The model that a command works with, and its prompt.

    Attributes:
        model_id: a hub id or a folder.
        revision: on the hub; None is the newest.
        prompt: what the model is given with every image.
        facts: what config.json says.
    """

    model_id: str
    revision: str | None
    prompt: str
    facts: ModelFacts


def resolve_base(
    family: Family,
    model_id: str | None,
    revision: str | None,
    prompt: str | None,
    adapter: AdapterInfo | None = None,
    *,
    flag: str = "--base_model",
) -> Base:
    """Decide which base, revision and prompt to train, caption, plan or export with. Nothing is loaded.

    What the user gives comes first, then what the adapter says, then what a model in a folder says, then the
    family's defaults. An empty prompt counts as given.

    Args:
        family: the model's family.
        model_id, revision, prompt: what the user gave; None if nothing.
        adapter: the adapter that is loaded onto the base, if any.
        flag: the flag that names the model, for messages.

    Raises:
        UsageError: the adapter was trained on another base or family, or the family cannot read the prompt.
    """
    if adapter is not None:
        model_id = model_id or adapter.base_model
    model_id = model_id or family.model_id
    if adapter is not None:
        check_base(adapter, family.name, model_id, family.base_models)
        revision = revision or (adapter.revision if model_id == adapter.base_model else None)
        prompt = adapter.prompt if prompt is None else prompt
    if model_id == family.model_id:
        # The family's revision belongs to its default model; other models have other revisions.
        revision = revision or family.revision
    base_prompt = _read_base_prompt(model_id, family.name, flag)
    facts = family.describe(model_id, revision)
    prompt = next(p for p in (prompt, base_prompt, facts.default_prompt) if p is not None)
    family.check_prompt(prompt)
    return Base(model_id, revision, prompt, facts)


def _read_base_prompt(base_model: str, family: str, flag: str) -> str | None:
    """Return the prompt that a model in a local folder was trained with, or None if it does not say.

    Raises UsageError if the model is of another family.
    """
    training = _read_json(Path(base_model) / TRAINING_FILE) or {}
    _check_family(f"{flag} {base_model}", training.get("family"), family)
    return training.get("prompt")


def check_base(adapter: AdapterInfo, family: str, base_model: str, base_models: Iterable[str]) -> None:
    """Raise UsageError if the adapter was trained on another base, before anything is loaded.

    A base in a folder may have been moved, so only two ids on the hub are known to differ.

    Args:
        adapter: what the adapter says about itself.
        family: the name of the family to load it with.
        base_model: the base to load it onto.
        base_models: the family's official models.
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
    """Where a LoRA or model comes from: enough to load it, to resume it and to refuse the wrong base."""

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
        """Return the text of training.json; `extra` (step, epoch, loss) is added to the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(values | extra, indent=2, ensure_ascii=False) + "\n"


def find_versions() -> dict[str, str]:
    """Return the versions of everything that can change a run's numbers."""
    versions = {"caption-train": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options by name, with paths as text."""
    values = {f.name: getattr(options, f.name) for f in fields(options) if "help" in f.metadata}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

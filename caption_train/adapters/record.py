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
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from caption_train.config.training import TrainOptions
from caption_train.errors import UsageError
from caption_train.families import name_script
from caption_train.families.base import Family, ModelFacts
from caption_train.system.files import follow_pointer, read_json_object
from caption_train.version import __version__

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
    settings: Mapping[str, Any] = field(default_factory=dict)
    mixed_precision: str | None = None


def find_adapter(folder: Path | str) -> Path:
    """Return the folder that `--peft_model` means: `last` and `best` are files where there are no links."""
    return follow_pointer(Path(folder)) if Path(folder).is_file() else Path(folder)


def read_adapter(folder: Path | str, flag: str = "--peft_model") -> AdapterInfo:
    """Read training.json and adapter_config.json of an adapter, without its weights.

    Args:
        folder: the adapter's folder, or the `last` or `best` of a run.
        flag: the flag that names it, for messages.

    Raises:
        UsageError: there is no such folder, or it holds no PEFT adapter.
        CaptionTrainError: one of the files is damaged.
    """
    folder = find_adapter(folder)
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder}: there is no such folder")
    config = _read_json(folder / "adapter_config.json")
    if config is None and (folder / "config.json").is_file():
        raise UsageError(f"{flag} {folder}: a full model: use --base_model {folder}")
    saved = [str(folder / name) for name in ("best", "last") if os.path.lexists(folder / name)]
    if config is None and saved:
        raise UsageError(f"{flag} {folder}: a run that has not finished; take {' or '.join(saved)}")
    if config is None:
        raise UsageError(f"{flag} {folder}: holds no adapter_config.json, so it is no PEFT adapter")
    training = _read_json(folder / TRAINING_FILE) or {}
    return AdapterInfo(
        folder,
        training.get("base_model") or config.get("base_model_name_or_path"),
        training.get("family"),
        training.get("revision") or config.get("revision"),
        training.get("prompt"),
        training.get("settings") or {},
        (training.get("options") or {}).get("mixed_precision"),
    )


@dataclass(frozen=True)
class Base:
    """The model that a command works with, and its prompt.

    Attributes:
        model_id: a hub id or a folder.
        revision: on the hub; None is the newest.
        prompt: what the model is given with every image.
        facts: what config.json says.
        settings: what `Family.configure` applies to the processor.
        changes: a line for each setting that differs from what the model was trained with.
    """

    model_id: str
    revision: str | None
    prompt: str
    facts: ModelFacts
    settings: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


def resolve_base(
    family: Family,
    model_id: str | None,
    revision: str | None,
    prompt: str | None,
    adapter: AdapterInfo | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    flag: str = "--base_model",
    adapter_flag: str = "--peft_model",
) -> Base:
    """Decide which base, revision and prompt to train, caption, plan or export with. Nothing is loaded.

    What the user gives comes first, then what the adapter says, then what a model in a folder says, then the
    family's defaults. An empty prompt counts as given.

    Args:
        family: whose model it is.
        model_id, revision, prompt: what the user gave, None where nothing.
        adapter: what goes on the base, if anything does.
        settings: values of the flags in `family.settings`, None where the user gave none.
        flag, adapter_flag: the flags that name model and adapter, for messages.

    Raises:
        UsageError: the adapter was trained on another base or family, or the family cannot read the prompt.
    """
    if adapter is not None:
        model_id = model_id or adapter.base_model
    model_id = model_id or family.model_id
    if model_id is None:
        raise UsageError(f"{flag} is required: a hub id such as {family.example_model}, or a folder")
    if adapter is not None:
        check_base(adapter, family.name, model_id, family.base_models, adapter_flag, flag)
        revision = revision or (adapter.revision if model_id == adapter.base_model else None)
    if model_id == family.model_id:
        # The family's revision belongs to its default model; other models have other revisions.
        revision = revision or family.revision
    trained = _read_base_settings(model_id, family.name, flag)
    if adapter is not None:
        trained |= {k: v for k, v in {"prompt": adapter.prompt, **adapter.settings}.items() if v is not None}
    facts = family.describe(model_id, revision)
    asked = {"prompt": prompt, **(settings or {})}
    changes = _list_changes(asked, trained) if family.settings else ()
    chosen = {name: trained.get(name) if value is None else value for name, value in asked.items()}
    prompt = chosen.pop("prompt")
    prompt = facts.default_prompt if prompt is None else prompt
    family.check_prompt(prompt)
    return Base(model_id, revision, prompt, facts, chosen, changes)


def name_served(
    family: Family,
    model: str,
    prompt: str | None,
    settings: Mapping[str, Any],
    adapter: AdapterInfo | None = None,
) -> Base:
    """Return what a served model is asked: as `resolve_base`, but the server holds base and adapter."""
    trained: dict[str, Any] = {}
    if adapter is not None:
        _check_family(f"--peft_model {adapter.folder}", adapter.family, family.name)
        trained = {"prompt": adapter.prompt, **adapter.settings}
    asked = {"prompt": prompt, **settings}
    chosen = {name: trained.get(name) if value is None else value for name, value in asked.items()}
    changes = _list_changes(asked, trained)
    found = chosen.pop("prompt")
    return Base(
        model, None, family.facts.default_prompt if found is None else found, family.facts, chosen, changes
    )


def _list_changes(asked: Mapping[str, Any], trained: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"--{name} {value!r}: the model was trained with {trained[name]!r}"
        for name, value in asked.items()
        if None not in (value, trained.get(name)) and value != trained[name]
    )


def read_request(options: Any, family: Family) -> tuple[str | None, dict[str, Any]]:
    """Return prompt and settings that TrainOptions or CaptionOptions ask for; None where they do not."""
    if options.preset and options.preset not in family.presets:
        raise UsageError(
            f"--preset {options.preset}: {family.title} have {', '.join(family.presets) or 'none'}"
        )
    prompt = family.presets[options.preset] if options.preset else options.prompt
    settings = {name: getattr(options, name) for name in family.settings}
    return prompt if options.task is None else options.task, settings


def _read_base_settings(base_model: str, family: str, flag: str) -> dict[str, Any]:
    """Return prompt and settings that a model in a local folder was trained with, as far as it says.

    Raises UsageError if the model is of another family.
    """
    training = _read_json(Path(base_model) / TRAINING_FILE) or {}
    _check_family(f"{flag} {base_model}", training.get("family"), family)
    return {"prompt": training.get("prompt"), **(training.get("settings") or {})}


def check_base(
    adapter: AdapterInfo,
    family: str,
    base_model: str,
    base_models: Iterable[str],
    flag: str = "--peft_model",
    base_flag: str = "--base_model",
) -> None:
    """Raise UsageError if the adapter was trained on another base, before anything is loaded.

    A base in a folder may have been moved, so only two ids on the hub are known to differ.

    Args:
        adapter: what the adapter says about itself.
        family: the name of the family to load it with.
        base_model: the base to load it onto.
        base_models: the family's official models.
        flag, base_flag: the flags that name adapter and base, for messages.
    """
    _check_family(f"{flag} {adapter.folder}", adapter.family, family)
    if base_model == adapter.base_model and Path(base_model).is_absolute() and not Path(base_model).is_dir():
        raise UsageError(f"{flag} {adapter.folder}: trained on {base_model}, which is gone; give {base_flag}")
    known = set(base_models)
    if adapter.base_model in known and base_model in known and adapter.base_model != base_model:
        raise UsageError(
            f"{flag} {adapter.folder}: trained on {adapter.base_model}, not {base_flag} {base_model}"
        )


def _check_family(what: str, trained: str | None, family: str) -> None:
    if trained not in (None, family):
        trains = not what.startswith(("--peft_model", "--base_model"))
        do, script = (
            ("train", name_script(trained, trains=True)) if trains else ("caption", name_script(trained))
        )
        raise UsageError(f"{what}: trained on {trained}, not on {family}; {do} with {script}")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, dict.fromkeys(_TEXTS, str) | {"settings": dict, "options": dict})
    except (FileNotFoundError, NotADirectoryError):
        return None


_TEXTS = ("base_model", "base_model_name_or_path", "family", "revision", "prompt")


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
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self, **extra: Any) -> str:
        """Return the text of training.json; `extra` (step, epoch, loss) is added to the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.settings:
            del values["settings"]
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


def _as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def describe_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options by name, with paths as text."""
    kept = {f.name: f.metadata.get("recorded", False) for f in fields(options)}
    values = {name: getattr(options, name) for name, recorded in kept.items() if recorded}
    return {
        name: _as_json(value)
        for name, value in values.items()
        if kept[name] is True or value not in (None, [])
    }

"""Goes on from a LoRA: `--init_adapter` starts a new run from its weights, with its rank and targets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caption_train.adapters.record import TRAINING_FILE, AdapterInfo, find_adapter, read_adapter
from caption_train.config.training import TrainOptions
from caption_train.errors import UsageError
from caption_train.families.weight_files import open_weights
from caption_train.system.files import read_json_object

FLAG = "--init_adapter"
SHAPE = {"rank": "r", "alpha": "lora_alpha", "dora": "use_dora", "rslora": "use_rslora"}
"""Flag → member of adapter_config.json, for what the LoRA's tensors and their scale depend on."""
PLACES = ("target_modules", "train_parts")
"""Flags that say which modules have a LoRA, as our training.json keeps them."""
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MORE_THAN_LORA = ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "lora_bias")


def adopt_adapter(options: TrainOptions) -> tuple[TrainOptions, AdapterInfo | None]:
    """Return the options with rank, alpha and targets of `--init_adapter`, and what that adapter says.

    Args:
        options: as the user gave them. What their `sources` name must be as the adapter has it.

    Returns:
        The options and the adapter; as they were, and None, without the flag.

    Raises:
        UsageError: it is no LoRA, or a flag that was given differs from it.
        CaptionTrainError: its files are damaged.
    """
    if options.init_adapter is None:
        return options, None
    adapter = read_adapter(options.init_adapter, FLAG)
    folder = find_adapter(options.init_adapter)
    config = read_json_object(folder / "adapter_config.json", {"r": int, "lora_alpha": int | float})
    _refuse_other_kinds(config, options.init_adapter)
    values = {flag: config.get(member) for flag, member in SHAPE.items()}
    values |= _find_places(folder, config)
    values = {flag: value for flag, value in values.items() if value is not None}
    for flag, value in values.items():
        given = getattr(options, flag)
        if flag in options.sources and not _is_same(given, value):
            raise UsageError(
                f"--{flag} {_show(given)}: {FLAG} {options.init_adapter} was trained with {_show(value)}; "
                "drop the flag, or start a new LoRA"
            )
    # The base that it was trained on, unless the user names one.
    model_id = options.model_id if "model_id" in options.sources else adapter.base_model or options.model_id
    return replace(options, model_id=model_id, **values), adapter


def refuse_parts(folder: Path, parts: Mapping[str, str], frozen: Sequence[str], flag: str) -> None:
    """Raise UsageError if the LoRA of `--init_adapter` trains a part that a flag leaves frozen.

    Args:
        folder: the LoRA's.
        parts: of the base, part → pattern of module names.
        frozen: the parts that must not be trained.
        flag: what leaves them frozen.
    """
    file = next((path for path in map(find_adapter(folder).joinpath, WEIGHT_FILES) if path.is_file()), None)
    for name in map(str, open_weights(file) if file else ()):
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if part := next((part for part in frozen if re.fullmatch(parts[part], module)), None):
            raise UsageError(
                f"{flag}: {FLAG} {folder} trains the base's {part} part, such as {module}; drop {flag}, or "
                "start a new LoRA"
            )


def _refuse_other_kinds(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("peft_type", "LORA")
    more = [name for name in MORE_THAN_LORA if config.get(name)]
    if config.get("bias", "none") != "none":
        more.append("bias")
    if kind != "LORA" or more:
        what = f"is {kind}" if kind != "LORA" else f"has {', '.join(more)} beside its LoRA"
        raise UsageError(f"{FLAG} {folder}: {what}; a plain LoRA can be trained on")


def _find_places(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return target_modules and train_parts: what the user gave then, else what PEFT was given."""
    try:
        training = read_json_object(folder / TRAINING_FILE, {"options": dict}).get("options") or {}
    except FileNotFoundError:
        training = {}
    if isinstance(training.get("target_modules"), list):
        return {name: training.get(name) for name in PLACES}
    targets = config.get("target_modules")
    # A regular expression is no list of names: --target_modules has to say what it means.
    return {"target_modules": sorted(map(str, targets))} if isinstance(targets, list) else {}


def _is_same(given: Any, value: Any) -> bool:
    return set(given) == set(value) if isinstance(given, list) and isinstance(value, list) else given == value


def _show(value: Any) -> str:
    return " ".join(map(str, value)) or "all" if isinstance(value, list) else str(value)

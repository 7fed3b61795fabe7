"""Chooses which modules to train: by name, or in some parts only (vision, projector, language).

A part is a regular expression that matches the names of its modules.
"""

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn

from caption_train.errors import UsageError

TRAINABLE_KINDS = (nn.Linear, nn.Conv2d)


def choose_targets(model: nn.Module, targets: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Return the LoRA's targets: the given ones, and all Linear layers of each part without any given target.

    PEFT must also be told to leave out the modules `outside` of the parts.

    Args:
        model: the base model.
        targets: names, or ends of names, of modules.
        parts: regular expressions of module names.

    Raises:
        UsageError: a part has no Linear.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = _name_each(model, targets, parts)
    for part in parts:
        held = [name for name in linears if re.fullmatch(part, name)]
        if not held:
            raise UsageError(f"--train_parts: this model has no Linear in the part {part}")
        if not any(f".{name}".endswith(tuple(f".{target}" for target in targets)) for name in held):
            chosen += held
    return chosen


def _name_each(model: nn.Module, targets: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Return `targets`, or the full names of what they mean where they also name wrappers of a Linear.

    Gemma 4's vision tower has Linears inside modules that are called q_proj too, which no LoRA goes on.
    """
    endings = tuple(f".{target}" for target in targets)
    left_out = outside(parts) or r"(?!)"
    meant = {
        name: module
        for name, module in model.named_modules()
        if f".{name}".endswith(endings) and not re.fullmatch(left_out, name)
    }
    if all(isinstance(module, TRAINABLE_KINDS) for module in meant.values()):
        return list(targets)
    return [name for name, module in meant.items() if isinstance(module, TRAINABLE_KINDS)]


def outside(parts: Sequence[str]) -> str | None:
    """Return a regular expression that matches the modules outside of all `parts`, or None without parts."""
    return rf"(?!(?:{'|'.join(parts)})$).*" if parts else None


def find_part(name: str, parts: Mapping[str, str]) -> str | None:
    """Return the part of a parameter by its name, which may be one of a LoRA; None if it is in none.

    parts: part → regular expression of module names.
    """
    module = name.removeprefix("base_model.model.").rpartition(".")[0].partition(".lora_")[0]
    return next((part for part, pattern in parts.items() if re.fullmatch(pattern, module)), None)


def freeze_outside(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze every parameter whose module is outside of all `parts`; without parts, freeze nothing."""
    if not parts:
        return
    excluded = outside(parts)
    for name, parameter in model.named_parameters():
        if re.fullmatch(excluded, name.rpartition(".")[0]):
            parameter.requires_grad_(False)


def check_targets(model: nn.Module, target_modules: Sequence[str]) -> None:
    """Raise UsageError for a target that matches no Linear or Conv2d; the message names similar ones."""
    names = [name for name, module in model.named_modules() if isinstance(module, TRAINABLE_KINDS)]
    endings = sorted({ending for name in names for ending in _endings(name)})
    for target in target_modules:
        if target in endings:
            continue
        close = difflib.get_close_matches(target, endings, 3, cutoff=0.5)
        leaves = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(leaves[:20])}"
        raise UsageError(f"--target_modules {target}: no Linear or Conv2d has this name; {hint}")


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]

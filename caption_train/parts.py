"""Training some parts of a model only: vision, projector, language. A part is a regular expression of its
modules' names."""

import re
from collections.abc import Sequence

from torch import nn

from caption_train.errors import UsageError


def choose_targets(model: nn.Module, targets: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Return the LoRA's targets for `parts`: those given, and every Linear of a part that holds none of them.

    Raises UsageError for a part that has no Linear. PEFT is to be told what `outside` the parts to leave out.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = list(targets)
    for part in parts:
        held = [name for name in linears if re.fullmatch(part, name)]
        if not held:
            raise UsageError(f"--train_parts: this model has no Linear in the part {part}")
        if not any(f".{name}".endswith(tuple(f".{target}" for target in targets)) for name in held):
            chosen += held
    return chosen


def outside(parts: Sequence[str]) -> str | None:
    """Return a regular expression of the modules that are in none of `parts`; None if there are no parts."""
    return rf"(?!(?:{'|'.join(parts)})$).*" if parts else None


def freeze_outside(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze every parameter whose module is in none of `parts`, if any are given."""
    if not parts:
        return
    excluded = outside(parts)
    for name, parameter in model.named_parameters():
        if re.fullmatch(excluded, name.rpartition(".")[0]):
            parameter.requires_grad_(False)

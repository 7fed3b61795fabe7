"""The flags that save memory: one table, for advice when memory runs out and for `--plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caption_train.config.training import TrainOptions


@dataclass(frozen=True)
class MemorySaver:
    """Flags that save memory.

    Attributes:
        flags: as a user writes them.
        changes: the options that they set.
        cost: what they cost in speed or quality, roughly, to find the cheapest set; None if no plan can tell
            what they save.
        advised: whether a run that is out of memory is told of them.
    """

    flags: str
    changes: Mapping[str, Any]
    cost: int | None
    advised: bool = True


SAVERS = (
    MemorySaver("--auto_batch_size", {"auto_batch_size": True}, None),
    MemorySaver("--gradient_checkpointing", {"gradient_checkpointing": True}, 3),
    MemorySaver("--mixed_precision bf16", {"mixed_precision": "bf16"}, 1),
    MemorySaver("--optimizer_name AdamW8bit", {"optimizer_name": "AdamW8bit"}, 1, advised=False),
    MemorySaver("--quantize", {"quantize": "4bit"}, 4),
    MemorySaver(
        "--optimizer_name Flora --accumulation_compression",
        {"optimizer_name": "Flora", "accumulation_compression": True},
        5,
        advised=False,
    ),
)
_IN_FULL = {"mixed_precision": (None, "no"), "optimizer_name": ("AdamW",), "quantize": (None,)}
"""Values that leave something to save, for options that are no switches."""


def find_savers(options: TrainOptions) -> list[MemorySaver]:
    """Return the savers that are not in use yet, and a batch of one."""
    savers = [saver for saver in SAVERS if _is_unused(saver, options)]
    if options.batch_size > 1:
        steps = options.batch_size * options.gradient_accumulation_steps
        changes = {"batch_size": 1, "gradient_accumulation_steps": steps}
        flags = f"--batch_size 1 --gradient_accumulation_steps {steps}"
        savers.append(MemorySaver(flags, changes, 2, advised=False))
    return savers


def _is_unused(saver: MemorySaver, options: TrainOptions) -> bool:
    if "accumulation_compression" in saver.changes:
        return not options.accumulation_compression
    return all(getattr(options, name) in _IN_FULL.get(name, (False,)) for name in saver.changes)

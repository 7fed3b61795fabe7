"""What the families' `generate` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def limit_new_tokens(settings: Mapping[str, Any], config: PretrainedConfig, *, used: int) -> dict[str, Any]:
    """Return generation settings that stay within the decoder's positions, of which `used` are taken."""
    settings, room = dict(settings), config.max_position_embeddings - used + 1
    if "max_new_tokens" in settings:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
    return settings

"""Checks that prompt, caption and generated text fit into the decoder's positions, which they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


def note_positions(config: PretrainedConfig, processor: ProcessorMixin) -> None:
    """Set the tokenizer's `model_max_length`, which many on the hub lack, to the model's positions."""
    processor.tokenizer.model_max_length = config.text_config.max_position_embeddings


def check_prompt_length(length: int, processor: ProcessorMixin) -> None:
    """Raise UsageError if a prompt does not fit into the model.

    Args:
        length: tokens of the prompt and of everything else that must fit with it.
        processor: a processor that `note_positions` has seen.
    """
    limit = processor.tokenizer.model_max_length
    if length > limit:
        raise UsageError(
            f"--prompt: it is {length - limit:,} tokens too long for the {limit:,} positions of the model: "
            "shorten it"
        )


def limit_new_tokens(settings: Mapping[str, Any], config: PretrainedConfig, *, used: int) -> dict[str, Any]:
    """Return generation settings that stay within the decoder's positions.

    Args:
        settings: generation settings; only `max_new_tokens` is changed.
        config: the text model's config.
        used: how many positions are taken already.
    """
    settings, room = dict(settings), config.max_position_embeddings - used + 1
    if "max_new_tokens" in settings:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
    return settings

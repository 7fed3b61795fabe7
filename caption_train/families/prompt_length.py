"""How much text fits a model: its prompt, its caption and what it generates share the decoder's positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin


def note_positions(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Make the tokenizer's `model_max_length` the text model's positions; many hub tokenizers name none."""
    processor.tokenizer.model_max_length = model.config.text_config.max_position_embeddings


def check_prompt_length(length: int, processor: ProcessorMixin) -> None:
    """Refuse a prompt if `length`, all that must be read with it, is beyond the model's positions."""
    limit = processor.tokenizer.model_max_length
    if length > limit:
        raise UsageError(
            f"--prompt: it is {length - limit:,} tokens too long for the {limit:,} positions of the model: "
            "shorten it"
        )


def limit_new_tokens(settings: Mapping[str, Any], config: PretrainedConfig, *, used: int) -> dict[str, Any]:
    """Return generation settings that stay within the decoder's positions, of which `used` are taken."""
    settings, room = dict(settings), config.max_position_embeddings - used + 1
    if "max_new_tokens" in settings:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
    return settings

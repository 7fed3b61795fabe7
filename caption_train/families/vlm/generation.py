"""Generating captions with a model whose settings on the hub were made for chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from caption_train.families.base import Batch, Generated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caption_train.families.vlm.processor import VlmProcessor

NO_SAMPLING = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
"""Given over the checkpoint's settings: the likeliest caption, the same one every time."""


def generate(
    model: PreTrainedModel, processor: VlmProcessor, batch: Batch, settings: Mapping[str, Any]
) -> list[Generated]:
    """Caption a left-padded batch; `settings` are transformers' generation arguments."""
    from caption_train.families.decoding.leaving import letting_rows_leave
    from caption_train.families.prompt_length import limit_new_tokens

    used = batch["input_ids"].shape[1]
    settings = limit_new_tokens(
        NO_SAMPLING
        | {"eos_token_id": list(processor.chat.stop_ids), "pad_token_id": processor.tokenizer.pad_token_id}
        | dict(settings),
        model.config.get_text_config(),
        used=used,
    )
    with letting_rows_leave(model, settings) as settings:
        sequences = model.generate(**batch, **settings)
    return [to_generated(processor, ids) for ids in sequences[:, used:].tolist()]


def to_generated(processor: VlmProcessor, ids: list[int]) -> Generated:
    """Return the caption in generated ids, which end with a stop token, perhaps padding, or at the limit."""
    ends = [index for index, token in enumerate(ids) if token in processor.chat.stop_ids]
    ids = ids[: ends[0] + 1] if ends else ids
    kept = ids[:-1] if ends else ids
    text = processor.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generated(text.strip(), ids, bool(ends))

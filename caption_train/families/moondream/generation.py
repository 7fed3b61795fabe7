"""Generates with Moondream 2. Each image is encoded once, and all its rows share the key-value cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PhiModel,
)

from caption_train.families.moondream.config import MoondreamConfig
from caption_train.families.moondream.layers import find_image_tokens

MAX_NEW_TOKENS = 768
"""The longest answer of the official code, in tokens."""
CACHE = "cache" if "cache" in inspect.signature(PhiModel.forward).parameters else "past_key_values"
"""transformers' name for the key-value cache; it was renamed in 5.24."""


class SuppressAfterFirst(LogitsProcessor):
    """Forbids a token at every step but the first, as the official code does with its answer token."""

    def __init__(self, token_id: int, prompt_length: int) -> None:
        self.token_id = token_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.prompt_length:
            return scores
        return scores.index_fill(1, torch.tensor([self.token_id], device=scores.device), -torch.inf)


class MoondreamGenerationMixin(GenerationMixin):
    """`generate` for a model whose sequences begin with BOS and one image."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tilings: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers' `generate` does, encoding each image only once.

        All crops go through the vision tower in one pass. BOS and image tokens of each image go through the
        decoder once, however many rows, beams or returned sequences use them.

        Args:
            inputs: another name for `input_ids`.
            generation_config: settings; by default the model's.
            input_ids: [B, T] prompts.
            pixel_values: [C, 3, S, S], with `tilings` [I, 2]; or `image_embeds` [I, N, D] instead.
            image_index: [B], the image of each row; by default row i has image i.

        Returns:
            Prompts and answers [B × returned sequences, T + new tokens], right-padded.
        """
        input_ids = inputs if input_ids is None else input_ids
        if pixel_values is not None:
            image_embeds = self.get_image_features(pixel_values, tilings)
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.answer_token_id is not None:
            # Inserted first, as in the official code: after a top-p filter, this token might be the only one
            # left.
            processors.insert(0, SuppressAfterFirst(self.config.answer_token_id, input_ids.shape[1]))
        if image_embeds is not None:
            if image_index is None:
                image_index = torch.arange(len(image_embeds), device=image_embeds.device)
            chosen = generation_config or self.generation_config
            if self._can_share_prefix(input_ids, chosen, kwargs):
                expand = max(
                    kwargs.get(name) or getattr(chosen, name) or 1
                    for name in ("num_beams", "num_return_sequences")
                )
                rows = image_index.repeat_interleave(expand)
                kwargs[CACHE] = self.encode_prefix(input_ids, image_embeds, image_index, rows)
            else:
                kwargs["image_embeds"] = image_embeds[image_index]
        return super().generate(input_ids, generation_config, logits_processor=processors, **kwargs)

    def encode_prefix(
        self,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor,
        image_index: torch.Tensor,
        rows: torch.Tensor,
    ) -> DynamicCache:
        """Run the decoder on BOS and image tokens, once per image.

        Args:
            input_ids: [B, T], beginning with BOS and image tokens.
            image_embeds: [I, N, D].
            image_index: [B], the image of each row.
            rows: the image of each row of the result, beams included.

        Returns:
            The key-value cache with one row per entry of `rows`.
        """
        length = self.config.image_seq_length + 1
        first_row = [int((image_index == image).nonzero()[0, 0]) for image in range(len(image_embeds))]
        cache = DynamicCache(config=self.config.text_config)
        self.model(
            input_ids=input_ids[first_row, :length],
            image_embeds=image_embeds,
            cache=cache,
            use_cache=True,
        )
        if not torch.equal(rows, torch.arange(len(image_embeds), device=rows.device)):
            cache.batch_select_indices(rows)
        return cache

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pass the image to the first step only, with the plain mask: the model adds the prefix to it."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if model_inputs.get("image_embeds") is not None:
            if model_inputs["input_ids"].shape[1] > self.config.image_seq_length:
                model_inputs["attention_mask"] = kwargs.get("attention_mask")
            else:
                del model_inputs["image_embeds"]
        return model_inputs

    def _can_share_prefix(
        self, input_ids: torch.Tensor, chosen: GenerationConfig, kwargs: dict[str, Any]
    ) -> bool:
        """Tell whether every row is BOS, image and more, and the cache is of the default kind."""
        given = ("past_key_values", "cache", "assistant_model")
        if any(kwargs.get(name) is not None for name in given):
            return False
        if kwargs.get("cache_implementation", chosen.cache_implementation) is not None:
            return False
        if kwargs.get("use_cache", chosen.use_cache) is False:
            return False
        count = self.config.image_seq_length
        is_image = find_image_tokens(input_ids, self.config.image_token_id, count)
        mask = kwargs.get("attention_mask")
        attended = mask is None or bool(mask[:, : count + 1].all())
        return attended and input_ids.shape[1] > count + 1 and bool(is_image[:, 1 : count + 1].all())


def make_generation_config(config: MoondreamConfig) -> GenerationConfig:
    """Return the settings of the official code, but without sampling: each time, the likeliest token."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.bos_token_id,
        pad_token_id=config.bos_token_id,
    )

"""Builds Moondream 2 of transformers' parts: a SigLIP tower, a two-layer projector and a Phi decoder.

Legend: B sequences, T tokens, I images, C crops of all images, S side of a crop in pixels, P = 27 patches per
side, N = P² image tokens, V width of the vision tower, D width of the decoder. Source: vikhyat/moondream,
`moondream/torch/`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, PhiModel, PreTrainedModel, SiglipVisionModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from caption_train.families.moondream import processor  # noqa: F401  (so that AutoProcessor knows it too)
from caption_train.families.moondream.config import MoondreamConfig
from caption_train.families.moondream.files import check_sizes_given
from caption_train.families.moondream.generation import (
    CACHE,
    MoondreamGenerationMixin,
    make_generation_config,
)
from caption_train.families.moondream.layers import (
    MoondreamProjector,
    MoondreamRegion,
    count_crops,
    find_image_tokens,
    stitch_windows,
)


class MoondreamPreTrainedModel(PreTrainedModel):
    """Settings that both classes below share."""

    config_class = MoondreamConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiDecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True


class MoondreamModel(MoondreamPreTrainedModel):
    """Turns image and tokens into the last hidden states, without the head."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__(config)
        self.vision_tower = SiglipVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = MoondreamProjector(config)
        self.language_model = PhiModel._from_config(config.text_config)
        if config.region is not None:
            self.region = MoondreamRegion(config.region, config.text_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, tilings: torch.Tensor) -> torch.Tensor:
        """Encode the crops of all images in one pass.

        Args:
            pixel_values: [C, 3, S, S].
            tilings: (rows, columns) of each image, [I, 2].

        Returns:
            Image embeddings [I, N, D].
        """
        return self.multi_modal_projector(self.encode_crops(pixel_values, tilings))

    def encode_crops(self, pixel_values: torch.Tensor, tilings: torch.Tensor) -> torch.Tensor:
        """Return what the projector reads of each image, the whole and its windows, [I, N, 2 V]."""
        crops = self.vision_tower(pixel_values).last_hidden_state
        tilings = [tuple(tiling) for tiling in tilings.tolist()]
        counts = count_crops(tilings)
        if sum(counts) != len(crops):
            raise ValueError(f"tilings {tilings} mean {sum(counts)} crops, but pixel_values has {len(crops)}")
        features = [
            torch.cat([image[0], self.pool_windows(image[-tiling[0] * tiling[1] :], tiling)], dim=-1)
            for image, tiling in zip(crops.split(counts), tilings, strict=True)
        ]
        return torch.stack(features)

    def pool_windows(self, windows: torch.Tensor, tiling: tuple[int, int]) -> torch.Tensor:
        """Average the features of an image's windows [rows × columns, N, V] to one crop's size [N, V]."""
        if tiling == (1, 1):
            return windows[0]
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        grid = stitch_windows(windows.unflatten(1, (side, side)), tiling, self.config.overlap_margin)
        grid = grid.permute(2, 0, 1)[None]
        if self.config.local_pooling == "bilinear":
            pooled = F.interpolate(grid, size=(side, side), mode="bilinear")
        else:
            pooled = F.adaptive_avg_pool2d(grid, (side, side))
        return pooled[0].permute(1, 2, 0).flatten(0, 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tilings: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return Phi's output; for the arguments see `MoondreamForConditionalGeneration.forward`."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and image_embeds is None:
            image_embeds = self.get_image_features(pixel_values, tilings)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if image_embeds is not None:
            if image_index is not None:
                image_embeds = image_embeds[image_index]
            is_image = find_image_tokens(input_ids, self.config.image_token_id, self.config.image_seq_length)
            if int(is_image.sum()) != image_embeds.shape[0] * image_embeds.shape[1]:
                raise ValueError(f"{int(is_image.sum())} image tokens, but {len(image_embeds)} images")
            inputs_embeds = inputs_embeds.masked_scatter(
                is_image[..., None], image_embeds.to(inputs_embeds.dtype)
            )
            if self.config.prefix_attention:
                attention_mask = self._prefix_mask(
                    is_image,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **{CACHE: cache},
                )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )

    def _prefix_mask(self, is_image: torch.Tensor, **inputs: Any) -> Any:
        """Return a causal mask in which all tokens up to the last image token attend to each other."""
        places = torch.arange(is_image.shape[1], device=is_image.device)
        ends = torch.where(is_image, places, -1).amax(dim=1)

        def in_prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (query <= ends[batch]) & (key <= ends[batch])

        return create_causal_mask(config=self.config.text_config, or_mask_function=in_prefix, **inputs)


class MoondreamForConditionalGeneration(MoondreamPreTrainedModel, MoondreamGenerationMixin):
    """Moondream 2 with its head. `from_pretrained` also reads the official layouts, hub or folder."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__(config)
        self.model = MoondreamModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """Load a model. Tensors of an official checkpoint are renamed, and fused projections split."""
        from caption_train.families.moondream.legacy.checkpoint import read_legacy

        legacy = None if kwargs.get("state_dict") is not None else read_legacy(name, **kwargs)
        if legacy is None:
            if name and Path(name).is_dir():
                check_sizes_given(Path(name))
            loaded = super().from_pretrained(name, *args, **kwargs)
        else:
            config, state_dict = legacy
            for used in ("config", "revision", "cache_dir", "token", "local_files_only", "force_download"):
                kwargs.pop(used, None)
            loaded = super().from_pretrained(None, *args, config=config, state_dict=state_dict, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if legacy is not None:
            model.generation_config = make_generation_config(config)
            model.name_or_path = model.config.name_or_path = str(name)
        if model.config.region is not None:
            model.model.region.requires_grad_(False)
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, tilings: torch.Tensor) -> torch.Tensor:
        """Encode all crops in one pass; see `MoondreamModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, tilings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tilings: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits and, with `labels`, the mean cross-entropy where they are not IGNORE_INDEX.

        Args:
            input_ids: [B, T]: BOS, N image tokens, text. Padding may be anywhere outside BOS and image.
            pixel_values: [C, 3, S, S], with `tilings` [I, 2]; or `image_embeds` [I, N, D] instead.
            image_index: [B], the image of each row; by default row i has image i.
            past_key_values: the older name of `cache`.
            labels: [B, T], not shifted.
            logits_to_keep: positions whose logits are computed: how many from the end (0 means all), or
                indices. The loss needs those before the labelled positions only.
            num_items_in_batch: what the sum of losses is divided by, instead of the number of labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            tilings=tilings,
            image_embeds=image_embeds,
            image_index=image_index,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            following = F.pad(labels, (0, 1), value=-100)[:, 1:][:, keep].contiguous()
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=following,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Saved adapters record the module of their base's class, so it must stay the one that older adapters have.
MoondreamForConditionalGeneration.__module__ = "caption_train.families.moondream_model"
sys.modules.setdefault(MoondreamForConditionalGeneration.__module__, sys.modules[__name__])

AutoConfig.register(MoondreamConfig.model_type, MoondreamConfig, exist_ok=True)
AutoModelForImageTextToText.register(MoondreamConfig, MoondreamForConditionalGeneration, exist_ok=True)

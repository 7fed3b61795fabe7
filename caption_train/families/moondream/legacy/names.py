"""Renames the tensors of Moondream 2 between the official layouts and the native one.

The new layout (2025-01-09 and later): `model.vision.…`, `model.text.…`, `model.region.…`, with or without
`model.`. The old layout (2024): `vision_encoder.…`, `text_model.…`, `region_model.…`. Both hold the same
tensors; in both, attention is one fused [queries | keys | values] projection. Source: vikhyat/moondream,
`moondream/torch/weights.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from caption_train.errors import CaptionTrainError
from caption_train.families.loading import shorten
from caption_train.families.moondream.config import MoondreamConfig
from caption_train.families.moondream.layers import region_shapes

HEAD = 64
"""Width of an attention head of the decoder, in every release."""

_BLOCK_PARTS = {
    "vision": {
        "ln1": ("layer_norm1",),
        "ln2": ("layer_norm2",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.out_proj",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
    "text": {
        "ln": ("input_layernorm",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.dense",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
}
_OUTER_PARTS = {
    "vision.patch_emb": "model.vision_tower.embeddings.patch_embedding",
    "vision.post_ln": "model.vision_tower.post_layernorm",
    "vision.proj_mlp.fc1": "model.multi_modal_projector.fc1",
    "vision.proj_mlp.fc2": "model.multi_modal_projector.fc2",
    "text.post_ln": "model.language_model.final_layernorm",
    "text.lm_head": "lm_head",
}
_OLD_NAMES = (
    (r"^vision\.proj_mlp\.", "vision_encoder.projection.mlp."),
    (r"^vision\.patch_emb\.", "vision_encoder.encoder.model.visual.patch_embed.linear."),
    (r"^vision\.pos_emb$", "vision_encoder.encoder.model.visual.pos_embed"),
    (r"^vision\.post_ln\.", "vision_encoder.encoder.model.visual.norm."),
    (r"^vision\.blocks\.(\d+)\.ln([12])\.", r"vision_encoder.encoder.model.visual.blocks.\1.norm\2."),
    (r"^vision\.blocks\.", "vision_encoder.encoder.model.visual.blocks."),
    (r"^text\.wte$", "text_model.transformer.embd.wte.weight"),
    (r"^text\.post_ln\.", "text_model.lm_head.ln."),
    (r"^text\.lm_head\.", "text_model.lm_head.linear."),
    (r"^text\.blocks\.(\d+)\.attn\.qkv\.", r"text_model.transformer.h.\1.mixer.Wqkv."),
    (r"^text\.blocks\.(\d+)\.attn\.proj\.", r"text_model.transformer.h.\1.mixer.out_proj."),
    (r"^text\.blocks\.", "text_model.transformer.h."),
    (r"^region\.(coord|size)_features$", r"region_model.\1_features.weight"),
    (r"^region\.", "region_model."),
    (r"^region_model\.coord_", "region_model.coordinate_"),
)


def legacy_names(config: MoondreamConfig) -> dict[str, tuple[str, ...]]:
    """Return each tensor name of the new layout, without `model.`, with the native names it joins."""
    names = {
        "vision.pos_emb": ("model.vision_tower.embeddings.position_embedding.weight",),
        "text.wte": ("model.language_model.embed_tokens.weight",),
    }
    modules = {theirs: (ours,) for theirs, ours in _OUTER_PARTS.items()}
    stacks = {
        "vision": ("model.vision_tower.encoder.layers", config.vision_config.num_hidden_layers),
        "text": ("model.language_model.layers", config.text_config.num_hidden_layers),
    }
    for part, (stack, layers) in stacks.items():
        for layer in range(layers):
            for theirs, ours in _BLOCK_PARTS[part].items():
                modules[f"{part}.blocks.{layer}.{theirs}"] = tuple(f"{stack}.{layer}.{name}" for name in ours)
    if config.region is not None:
        heads = region_shapes(config.region, config.text_config.hidden_size)
        names |= {f"region.{name}": (f"model.region.{name.replace('.', '_')}",) for name in heads}
    for theirs, ours in modules.items():
        for kind in ("weight", "bias"):
            names[f"{theirs}.{kind}"] = tuple(f"{name}.{kind}" for name in ours)
    return names


def legacy_shapes(config: MoondreamConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the new layout, by its name without `model.`."""
    text, vision = config.text_config, config.vision_config
    wide, seen, inner = text.hidden_size, vision.hidden_size, config.projector_dim
    query = text.num_attention_heads * HEAD
    fused = query + 2 * text.num_key_value_heads * HEAD
    layers = {
        "vision.patch_emb": (seen, vision.num_channels * vision.patch_size**2),
        "vision.post_ln": (seen,),
        "vision.proj_mlp.fc1": (inner, 2 * seen),
        "vision.proj_mlp.fc2": (wide, inner),
        "text.post_ln": (wide,),
        "text.lm_head": (text.vocab_size, wide),
    }
    for part, width, hidden, qkv, proj, count in (
        ("vision", seen, vision.intermediate_size, 3 * seen, seen, vision.num_hidden_layers),
        ("text", wide, text.intermediate_size, fused, query, text.num_hidden_layers),
    ):
        block = {"ln": (width,), "ln1": (width,), "ln2": (width,), "attn.qkv": (qkv, width)}
        block |= {"attn.proj": (width, proj), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        layers |= {
            f"{part}.blocks.{i}.{name}": block[name] for i in range(count) for name in _BLOCK_PARTS[part]
        }
    shapes = {"vision.pos_emb": (1, config.image_seq_length, seen), "text.wte": (text.vocab_size, wide)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if config.region is not None:
        shapes |= {f"region.{name}": shape for name, shape in region_shapes(config.region, wide).items()}
    return shapes


def name_of_2024(name: str) -> str:
    """Return the old-layout name of a tensor of the new layout."""
    for pattern, replacement in _OLD_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_native(tensors: Mapping[str, torch.Tensor], config: MoondreamConfig) -> dict[str, torch.Tensor]:
    """Turn tensors of the new layout into a state dict of the native model.

    Args:
        tensors: name without `model.` → tensor.
        config: the model's config.

    Raises:
        CaptionTrainError: names every tensor that is missing, left over or of another shape.
    """
    table, shapes = legacy_names(config), legacy_shapes(config)
    if missing := sorted(table.keys() - tensors.keys()):
        raise CaptionTrainError(f"{len(missing)} tensors are not in the checkpoint: {shorten(missing)}")
    if unknown := sorted(tensors.keys() - table.keys()):
        raise CaptionTrainError(f"{len(unknown)} tensors of the checkpoint have no place: {shorten(unknown)}")
    if misshapen := [name for name in table if tuple(tensors[name].shape) != shapes[name]]:
        shown = [f"{n} is {list(tensors[n].shape)}, not {list(shapes[n])}" for n in misshapen]
        raise CaptionTrainError(f"{len(shown)} tensors have another shape: {shorten(shown)}")
    text, patch = config.text_config, config.vision_config.patch_size
    state = {}
    for theirs, ours in table.items():
        tensor = tensors[theirs]
        if theirs == "vision.patch_emb.weight":
            tensor = tensor.unflatten(1, (config.vision_config.num_channels, patch, patch))
        elif theirs == "vision.pos_emb":
            tensor = tensor[0]
        sizes = [len(tensor) // len(ours)] * len(ours)
        if theirs.startswith("text.") and len(ours) == 3:
            keys = text.num_key_value_heads * HEAD
            sizes = [text.num_attention_heads * HEAD, keys, keys]
        parts = tensor.split(sizes) if len(ours) > 1 else [tensor]
        # Copied, because `save_pretrained` takes parameters that share a storage for tied weights.
        state |= {
            name: part.clone() if len(ours) > 1 else part for name, part in zip(ours, parts, strict=True)
        }
    return state


def to_legacy(state: Mapping[str, torch.Tensor], config: MoondreamConfig) -> dict[str, torch.Tensor]:
    """Turn a native state dict into the new layout, with `model.`: the exact inverse of `to_native`."""
    tensors = {}
    for theirs, ours in legacy_names(config).items():
        tensor = state[ours[0]] if len(ours) == 1 else torch.cat([state[name] for name in ours])
        if theirs == "vision.patch_emb.weight":
            tensor = tensor.flatten(1)
        elif theirs == "vision.pos_emb":
            tensor = tensor[None]
        tensors[f"model.{theirs}"] = tensor.contiguous()
    return tensors


def to_names_of_2024(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn tensors of the new layout, with `model.`, into the layout of 2024."""
    new = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {name_of_2024(name): tensor for name, tensor in transpose_features(new).items()}


def transpose_features(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transpose the Fourier matrices of the detection heads, as the old layout stores them."""
    turned = ("region.coord_features", "region.size_features")
    return {name: t.T.contiguous() if name in turned else t for name, t in tensors.items()}

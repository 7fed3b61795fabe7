"""Translates the names of Florence-2's weights between Microsoft's layout (legacy) and the native one.

Only whole leading parts of a dotted name are replaced. So one table serves for tensors, modules and the keys
of adapters. No torch.
"""

import re

_VISION = "vision_tower.blocks.#.#"
_PROJECTOR = "model.multi_modal_projector"

PAIRS = (
    ("vision_tower.convs.#.proj", "model.vision_tower.convs.#.conv"),
    ("vision_tower.convs.#.norm", "model.vision_tower.convs.#.norm"),
    *(
        (f"{_VISION}.{block}.{legacy}", f"model.{_VISION}.{block}.{native}")
        for block, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn"))
        for legacy, native in (
            ("conv1.fn.dw", "conv1"),
            (f"{attention}.norm", "norm1"),
            (f"{attention}.fn", attention),
            ("conv2.fn.dw", "conv2"),
            ("ffn.norm", "norm2"),
            ("ffn.fn.net", "ffn"),
        )
    ),
    ("image_projection", f"{_PROJECTOR}.image_projection.weight"),  # a bare parameter, and transposed
    ("image_proj_norm", f"{_PROJECTOR}.image_proj_norm"),
    ("image_pos_embed", f"{_PROJECTOR}.image_position_embed"),
    ("visual_temporal_embed", f"{_PROJECTOR}.visual_temporal_embed"),
    ("language_model.model", "model.language_model"),
    ("language_model.lm_head", "lm_head"),
)
"""(legacy, native) leading parts of names; `#` is any index."""

TIED = {
    "shared": "language_model.model.shared.weight",
    "encoder": "language_model.model.encoder.embed_tokens.weight",
    "decoder": "language_model.model.decoder.embed_tokens.weight",
    "head": "language_model.lm_head.weight",
}
"""Legacy names of tied tensors. The first three are always one parameter; the head may be another."""

LOGITS_BIAS = "language_model.final_logits_bias"
"""A legacy buffer [1, vocabulary] without a native counterpart. BART never trains it, so it is zero."""

LEGACY_STARTS = (
    "vision_tower.",
    "language_model.",
    "image_proj",
    "image_pos_embed.",
    "visual_temporal_embed.",
)


def native_name(name: str) -> str | None:
    """Return the native name of a legacy tensor or module, or None.

    >>> native_name("language_model.lm_head.weight")
    'lm_head.weight'
    """
    return _rename(name, _TO_NATIVE)


def legacy_name(name: str) -> str | None:
    """Return the legacy name of a native tensor or module, or None."""
    return _rename(name, _TO_LEGACY)


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return None


def _rule(old: str, new: str) -> tuple[re.Pattern, str]:
    pattern = re.compile("^" + re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)")
    indices = iter(range(1, new.count("#") + 1))
    return pattern, re.sub("#", lambda _: rf"\{next(indices)}", new)


_TO_NATIVE = [_rule(legacy, native) for legacy, native in PAIRS]
_TO_LEGACY = [_rule(native, legacy) for legacy, native in PAIRS]

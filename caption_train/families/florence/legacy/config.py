"""Converts Florence-2's config between Microsoft's layout (legacy) and transformers' (native)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.florence.legacy.names import TIED

if TYPE_CHECKING:
    from transformers import Florence2Config, GenerationConfig

Shapes = Mapping[str, Sequence[int]]
"""Legacy tensor name → shape."""

VISION_DEFAULTS = {
    "drop_path_rate": 0.1,
    "patch_size": [7, 3, 3, 3],
    "patch_stride": [4, 2, 2, 2],
    "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True],
    "dim_embed": [256, 512, 1024, 2048],
    "num_heads": [8, 16, 32, 64],
    "num_groups": [8, 16, 32, 64],
    "depths": [1, 1, 9, 1],
    "window_size": 12,
    "projection_dim": 1024,
}
"""Defaults of the legacy configuration class, for fields that the file leaves out."""

EXPRESSIBLE = {
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    "image_pos_embed.type": "learned_abs_2d",
    "visual_temporal_embedding.type": "COSINE",
}
"""The only values that can be converted: the native class hard-codes them."""

TEXT_FIELDS = (
    *("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("encoder_attention_heads", "decoder_attention_heads", "encoder_layerdrop", "decoder_layerdrop"),
    *("dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "activation_function"),
    *("init_std", "scale_embedding", "use_cache"),
    *("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"),
)
"""Fields of a text_config that mean the same in both layouts."""

AUTHORS_GENERATION = {
    "num_beams": 3,
    "early_stopping": True,
    "no_repeat_ngram_size": 3,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
}
"""How Microsoft's four checkpoints generate. Without the n-gram ban, the large ones repeat `<s>` for ever."""

OTHER_GENERATION = {
    **{"min_length": 0, "length_penalty": 1.0, "repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0},
    **{"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
    **{"max_length": 20, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None},
}
"""Further settings that a legacy text_config may hold, each with its default, which changes nothing."""

DEFAULT_WIDTH = 1024
"""`d_model` if a text_config leaves it out."""

TOKEN_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def convert_config(
    raw: Mapping[str, Any], shapes: Shapes, *, tied: bool, image_token_id: int
) -> Florence2Config:
    """Convert a legacy config.json. Sizes of embedding tables are taken from the tensors.

    Args:
        raw: the content of config.json.
        shapes: legacy tensor name → shape.
        tied: whether the head equals the input embedding. The text model's three embeddings are always one.
        image_token_id: id of the token that stands for the image.

    Raises:
        CaptionTrainError: the config says something that the native class cannot express.
    """
    from transformers import Florence2Config

    vision = {**VISION_DEFAULTS, **_said(raw.get("vision_config"))}
    text = {**TOKEN_IDS, **_said(raw.get("text_config"))}
    _check_expressible(vision, text)
    tokens = {name: text[name] for name in TOKEN_IDS}
    return Florence2Config(
        vision_config={
            **{name: vision[name] for name in VISION_DEFAULTS if name != "dim_embed"},
            "embed_dim": vision["dim_embed"],
            "max_position_embeddings": _rows(shapes, "image_pos_embed.row_embeddings.weight"),
            "max_temporal_embeddings": _rows(
                shapes,
                "visual_temporal_embed.pos_idx_to_embed",
                (vision.get("visual_temporal_embedding") or {}).get("max_temporal_embeddings", 100),
            ),
        },
        text_config={
            "model_type": "bart",
            **{name: text[name] for name in TEXT_FIELDS if name in text},
            "vocab_size": next(shapes[name][0] for name in TIED.values() if name in shapes),
            # The table has two rows more than there are positions: fairseq's offset for padding.
            "max_position_embeddings": _rows(shapes, "language_model.model.encoder.embed_positions.weight")
            - 2,
            "forced_eos_token_id": text.get("forced_eos_token_id", AUTHORS_GENERATION["forced_eos_token_id"]),
            "tie_word_embeddings": True,
        },
        image_token_id=image_token_id,
        tie_word_embeddings=tied,
        **tokens,
    )


def restore_config(
    config: Florence2Config, generation: GenerationConfig, dtype: str = "float32"
) -> dict[str, Any]:
    """Convert a native config to a legacy config.json: the inverse of `convert_config`.

    Args:
        config: the native config.
        generation: the model's generation settings, which the legacy layout keeps in `text_config`.
        dtype: precision of the weights, by its name in torch.
    """
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    tokens = {name: text[name] for name in TOKEN_IDS if name != "decoder_start_token_id"}
    settings = {name: getattr(generation, name) for name in (*AUTHORS_GENERATION, *OTHER_GENERATION)}
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_florence2.Florence2Config",
            "AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration",
        },
        "model_type": "florence2",
        "is_encoder_decoder": True,
        "ignore_index": -100,
        "projection_dim": vision["projection_dim"],
        "vocab_size": text["vocab_size"],
        "torch_dtype": dtype,
        **tokens,
        "vision_config": {
            "model_type": "davit",
            **{name: vision[name] for name in VISION_DEFAULTS if name != "dim_embed"},
            "dim_embed": vision["embed_dim"],
            "enable_checkpoint": False,
            "image_feature_source": EXPRESSIBLE["image_feature_source"],
            "image_pos_embed": {
                "type": EXPRESSIBLE["image_pos_embed.type"],
                "max_pos_embeddings": vision["max_position_embeddings"],
            },
            "visual_temporal_embedding": {
                "type": EXPRESSIBLE["visual_temporal_embedding.type"],
                "max_temporal_embeddings": vision["max_temporal_embeddings"],
            },
        },
        "text_config": {
            **{name: text[name] for name in TEXT_FIELDS},
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["max_position_embeddings"],
            "is_encoder_decoder": True,
            "num_hidden_layers": text["encoder_layers"],
            **{name: value for name, value in settings.items() if value is not None},
        },
    }


def make_generation_config(
    text_config: Mapping[str, Any], saved: Mapping[str, Any] | None = None
) -> GenerationConfig:
    """Return how a checkpoint generates: as `saved`, else as its `text_config`, else as the authors chose.

    The authors' values are used only if the settings got lost: a legacy config then has none of them, a
    native file has neither the n-gram ban nor the forced start.

    Args:
        text_config: as in the file, because transformers drops these settings when it parses a config.
        saved: the generation_config.json of a native checkpoint. Microsoft's code never used a legacy one.
    """
    from transformers import GenerationConfig

    said = {
        name: value
        for name, value in text_config.items()
        if (name in AUTHORS_GENERATION and value is not None)
        or (name in OTHER_GENERATION and value != OTHER_GENERATION[name])
    }
    tokens = {name: _said(text_config).get(name, value) for name, value in TOKEN_IDS.items()}
    if saved:
        said |= _said(saved)
        return GenerationConfig(**{**tokens, **(AUTHORS_GENERATION if is_lost(said) else {}), **said})
    # `forced_eos_token_id` proves nothing, as transformers keeps it. An n-gram ban of 0 is written so that
    # a native file shows later that nothing got lost.
    lost = said.keys().isdisjoint(AUTHORS_GENERATION.keys() - {"forced_eos_token_id"})
    unsaid = dict(AUTHORS_GENERATION) if lost else {"no_repeat_ngram_size": 0}
    if "forced_eos_token_id" not in text_config:
        unsaid["forced_eos_token_id"] = AUTHORS_GENERATION["forced_eos_token_id"]
    return GenerationConfig(**{**tokens, **unsaid, **said})


def is_lost(settings: Mapping[str, Any]) -> bool:
    """Tell whether generation settings lack what keeps Florence-2 from repeating itself."""
    return all(settings.get(name) is None for name in ("no_repeat_ngram_size", "forced_bos_token_id"))


def _said(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (config or {}).items() if value is not None}


def _check_expressible(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    for name, supported in EXPRESSIBLE.items():
        value: Any = vision
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value not in (None, supported):
            raise CaptionTrainError(
                f"vision_config.{name} is {value!r}; transformers' Florence-2 has only {supported!r}"
            )
    if vision["projection_dim"] != text.get("d_model", DEFAULT_WIDTH):
        raise CaptionTrainError(
            f"vision_config.projection_dim is {vision['projection_dim']}, text_config.d_model "
            f"{text.get('d_model', DEFAULT_WIDTH)}: the text model could not read the image"
        )
    if vision["patch_prenorm"][0]:
        raise CaptionTrainError(
            "vision_config.patch_prenorm[0] is true, which the original ignores and transformers does not"
        )
    if text.get("scale_embedding"):
        raise CaptionTrainError(
            "text_config.scale_embedding is true; the original does not scale the prompt, transformers does"
        )


def _rows(shapes: Shapes, name: str, default: int | None = None) -> int:
    if name in shapes:
        return shapes[name][0]
    if default is None:
        raise CaptionTrainError(f"the checkpoint has no tensor {name}")
    return default

"""Holds the dimensions and token ids of a Moondream 2, read from a native or an official `config.json`."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PhiConfig, PreTrainedConfig, SiglipVisionConfig

from caption_train.families.moondream.releases import (
    CODEGEN_ID,
    DEFAULT_REVISION,
    REVISIONS,
    STARMIE_ID,
)

_USED_IDS = ("bos_id", "eos_id", "answer_id")
REGION_2B = {
    "dim": 2048,
    "coord_feat_dim": 256,
    "coord_out_dim": 1024,
    "size_feat_dim": 512,
    "size_out_dim": 2048,
    "inner_dim": 8192,
}

_CODE = {
    "architectures": ["HfMoondream"],
    "auto_map": {
        "AutoConfig": "hf_moondream.HfConfig",
        "AutoModelForCausalLM": "hf_moondream.HfMoondream",
    },
}
_CODE_OF_2024 = {
    "architectures": ["Moondream"],
    "auto_map": {
        "AutoConfig": "configuration_moondream.MoondreamConfig",
        "AutoModelForCausalLM": "moondream.Moondream",
    },
    "text_config": {"model_type": "phi"},
}
"""Entries of config.json that name the official code."""


@strict
class MoondreamConfig(PreTrainedConfig):
    """The config of Moondream 2. The defaults are those of the 2B model at revision 2025-06-21.

    Attributes:
        bos_token_id: begins and ends sequences.
        answer_token_id: if given, a token that may be generated at the first step only.
        unused_token_ids: official names and ids of tokens that captions do not need.
        templates: token ids around a caption task or a question.
        question_space: whether a space precedes the question.
        prefix_attention: whether BOS and image tokens attend to each other in both directions.
        crops: "overlap", or "fixed" as before 2025.
        max_crops: the largest number of windows of an image; see `image_processor`.
        overlap_margin: overlap of windows in patches; see `image_processor`.
        region: dimensions of the detection heads; None if the model has none.
    """

    # The `model_type` of the official config.json, so that AutoConfig reads it with this class.
    model_type = "moondream1"
    sub_configs = {"text_config": PhiConfig, "vision_config": SiglipVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projector_dim: int = 8192
    region: dict | None = None
    bos_token_id: int | None = STARMIE_ID
    answer_token_id: int | None = None
    image_token_id: int | None = None
    unused_token_ids: dict | None = None
    templates: dict | None = None
    question_space: bool = False
    prefix_attention: bool = True
    crops: str = "overlap"
    max_crops: int = 12
    overlap_margin: int = 4
    local_pooling: str = "average"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = make_text_config({})
        if self.vision_config is None:
            self.vision_config = make_vision_config({})
        for name, config_class in self.sub_configs.items():
            if isinstance(given := getattr(self, name), dict):
                setattr(self, name, config_class(**given))
        super().__post_init__(**kwargs)
        if self.templates is None:
            self.templates = REVISIONS[DEFAULT_REVISION]["templates"]
        if self.image_token_id is None:
            self.image_token_id = self.text_config.vocab_size - 1
        # Sequences begin and end with the same token.
        self.text_config.bos_token_id = self.text_config.eos_token_id = self.bos_token_id
        # bitsandbytes and PEFT read hidden_size and vocab_size here.
        self.hidden_size, self.vocab_size = self.text_config.hidden_size, self.text_config.vocab_size

    @property
    def image_seq_length(self) -> int:
        """Number of image tokens in every prompt: one per patch of a crop."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> MoondreamConfig:
        """Read a native config, or an official one (`"config": {…}`, which may be empty)."""
        if "config" in config_dict or "Moondream" in (config_dict.get("architectures") or ()):
            config_dict = native_dict(config_dict)
        return super().from_dict(config_dict, **kwargs)


def make_text_config(text: dict[str, Any]) -> PhiConfig:
    """Make the Phi config from the official `text` dict; what it leaves out is as in the 2B model."""
    heads = text.get("n_heads", text.get("dim", 2048) // 64)
    return PhiConfig(
        hidden_size=text.get("dim", 2048),
        intermediate_size=text.get("ff_dim", 8192),
        num_hidden_layers=text.get("n_layers", 24),
        vocab_size=text.get("vocab_size", 51200),
        max_position_embeddings=text.get("max_context", 2048),
        num_attention_heads=heads,
        # The official code uses the 2B model's 32 if the count is missing, which is wrong for the 0.5B model.
        num_key_value_heads=text.get("n_kv_heads") or heads,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        tie_word_embeddings=False,
    )


def make_vision_config(vision: dict[str, Any]) -> SiglipVisionConfig:
    """Make the SigLIP config from the official `vision` dict; what it leaves out is as in the 2B model."""
    return SiglipVisionConfig(
        hidden_size=vision.get("enc_dim", 1152),
        intermediate_size=vision.get("enc_ff_dim", 4304),
        num_hidden_layers=vision.get("enc_n_layers", 27),
        num_attention_heads=vision.get("enc_n_heads", vision.get("enc_dim", 1152) // 72),
        num_channels=vision.get("in_channels", 3),
        image_size=vision.get("crop_size", 378),
        patch_size=vision.get("enc_patch_size", 14),
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-5,
        vision_use_head=False,
    )


def find_release(legacy: dict[str, Any], revision: str | None = None) -> str:
    """Return which release supplies what the official `config.json` leaves out; `revision` if it is one."""
    of_2024 = "Moondream" in (legacy.get("architectures") or ())
    return revision if revision in REVISIONS else "2024-08-26" if of_2024 else DEFAULT_REVISION


def native_dict(legacy: dict[str, Any], release: str | None = None) -> dict[str, Any]:
    """Translate an official `config.json` to `MoondreamConfig` keywords.

    Args:
        legacy: the content of config.json.
        release: a key of `REVISIONS`, which supplies what config.json leaves out.
    """
    facts = REVISIONS[release or find_release(legacy)]
    nested = legacy.get("config") or {}
    vision, tokenizer = nested.get("vision", {}), nested.get("tokenizer", {})
    settings = dict(facts)
    if "bos_id" in tokenizer:
        settings |= {
            "bos_token_id": tokenizer["bos_id"],
            "answer_token_id": tokenizer.get("answer_id"),
            "unused_token_ids": {
                k: v for k, v in tokenizer.items() if k.endswith("_id") and k not in _USED_IDS
            },
            "templates": tokenizer.get("templates") or settings["templates"],
        }
        if tokenizer["bos_id"] != facts["bos_token_id"]:
            settings["question_space"] = tokenizer["bos_id"] == CODEGEN_ID
    settings |= {
        ours: vision[theirs]
        for ours, theirs in {
            "max_crops": "max_crops",
            "overlap_margin": "overlap_margin",
            "projector_dim": "proj_inner_dim",
        }.items()
        if theirs in vision
    }
    return {
        "text_config": make_text_config(nested.get("text", {})).to_dict(),
        "vision_config": make_vision_config(vision).to_dict(),
        "region": {**REGION_2B, **{k: v for k, v in nested.get("region", {}).items() if k in REGION_2B}},
        "dtype": legacy.get("dtype") or legacy.get("torch_dtype"),
        **settings,
    }


def legacy_dict(config: MoondreamConfig, dtype: Any = "float32") -> dict[str, Any]:
    """Translate a config back to an official `config.json`, with its nested dict filled in."""
    text, vision = config.text_config, config.vision_config
    tokenizer = {"bos_id": config.bos_token_id, "eos_id": config.bos_token_id}
    if config.answer_token_id is not None:
        tokenizer["answer_id"] = config.answer_token_id
    tokenizer |= {**(config.unused_token_ids or {}), "templates": config.templates}
    return {
        **(_CODE_OF_2024 if config.crops == "fixed" else _CODE),
        "config": {
            "text": {
                "dim": text.hidden_size,
                "ff_dim": text.intermediate_size,
                "n_layers": text.num_hidden_layers,
                "vocab_size": text.vocab_size,
                "max_context": text.max_position_embeddings,
                "n_heads": text.num_attention_heads,
                "n_kv_heads": text.num_key_value_heads,
                "prefix_attn": config.image_seq_length + 1,
            },
            "vision": {
                "enc_dim": vision.hidden_size,
                "enc_patch_size": vision.patch_size,
                "enc_n_layers": vision.num_hidden_layers,
                "enc_ff_dim": vision.intermediate_size,
                "enc_n_heads": vision.num_attention_heads,
                "proj_out_dim": text.hidden_size,
                "crop_size": vision.image_size,
                "in_channels": vision.num_channels,
                "max_crops": config.max_crops,
                "overlap_margin": config.overlap_margin,
                "proj_inner_dim": config.projector_dim,
            },
            "region": config.region,
            "tokenizer": tokenizer,
        },
        "model_type": config.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }

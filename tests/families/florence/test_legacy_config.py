"""Florence-2's settings survive: how it generates, and what its config says."""

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.errors import CaptionTrainError
from caption_train.families.florence.legacy.config import (
    AUTHORS_GENERATION,
    convert_config,
    make_generation_config,
    restore_config,
)

TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
SHAPES = {
    "language_model.model.shared.weight": (90, 16),
    "language_model.model.encoder.embed_positions.weight": (258, 16),
    "image_pos_embed.row_embeddings.weight": (40, 8),
}
RAW = {
    "vision_config": {
        "dim_embed": [8, 16, 16, 16],
        "num_heads": [1] * 4,
        "num_groups": [1] * 4,
        "projection_dim": 16,
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 60},
    },
    "text_config": {"d_model": 16, "encoder_layers": 1, "dropout": 0.3, "num_beams": 2, "vocab_size": 7},
}


def settings_of(text_config, saved=None):
    settings = make_generation_config(text_config, saved).to_diff_dict()
    settings.pop("transformers_version")
    return settings


@pytest.mark.parametrize("text_config", [{}, {"num_beams": None}, {"max_length": 20, "length_penalty": 1.0}])
def test_lost_settings_are_the_authors(text_config):
    """transformers drops them while it parses a config; then large models repeat <s> without end."""
    assert settings_of(text_config) == TOKENS | AUTHORS_GENERATION


def test_what_the_text_config_says_is_kept_and_nothing_added():
    said = {"num_beams": 1, "no_repeat_ngram_size": 0, "early_stopping": False, "length_penalty": 0.5}
    assert settings_of(said) == TOKENS | said | {"forced_eos_token_id": 2}


def test_an_end_that_is_expressly_not_forced_is_not():
    said = {"no_repeat_ngram_size": 3, "forced_eos_token_id": None}
    assert settings_of(said) == TOKENS | {"no_repeat_ngram_size": 3}


def test_a_legacy_config_that_says_something_has_lost_nothing():
    """The original bans nothing then, and the native file made of it must not look like a lost one."""
    found = settings_of({"num_beams": 2})
    assert found == TOKENS | {"num_beams": 2, "no_repeat_ngram_size": 0, "forced_eos_token_id": 2}
    assert settings_of({}, found) == found


def test_token_ids_come_from_the_text_config():
    said = {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9, "decoder_start_token_id": 8}
    assert settings_of(said).items() >= said.items()


def test_a_null_says_nothing():
    assert settings_of({"pad_token_id": None, "num_beams": None}) == TOKENS | AUTHORS_GENERATION
    raw = {part: {**RAW[part], "window_size": None, "pad_token_id": None} for part in RAW}
    config = convert_config(raw, SHAPES, tied=True, image_token_id=5)
    assert (config.vision_config.window_size, config.text_config.pad_token_id) == (12, 1)


def test_the_default_length_is_the_originals():
    assert "max_length" not in settings_of({"max_length": 20})
    assert settings_of({"max_length": 64})["max_length"] == 64


def test_a_native_file_goes_before_its_config():
    """The hub's file, copied next to a converted model, would make transformers' generate fail."""
    saved = {"num_beams": 5, "early_stopping": False}
    expected = TOKENS | AUTHORS_GENERATION | saved
    assert settings_of({"num_beams": 2, "eos_token_id": 2}, saved) == expected


@hypothesis.settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"no_repeat_ngram_size": st.integers(0, 5), "forced_bos_token_id": st.integers(0, 9)},
        optional={"num_beams": st.integers(1, 9), "early_stopping": st.booleans()},
    )
)
def test_settings_go_to_the_legacy_config_and_back(text_config):
    settings = make_generation_config(text_config)
    config = convert_config(RAW, SHAPES, tied=True, image_token_id=5)
    again = make_generation_config(restore_config(config, settings)["text_config"])
    assert again.to_diff_dict() == settings.to_diff_dict()


def test_sizes_come_from_the_tensors():
    config = convert_config(RAW, SHAPES, tied=False, image_token_id=5)
    assert (config.text_config.vocab_size, config.text_config.max_position_embeddings) == (90, 256)
    assert config.vision_config.max_position_embeddings == 40
    assert config.vision_config.embed_dim == [8, 16, 16, 16]
    assert config.text_config.dropout == 0.3
    assert config.vision_config.max_temporal_embeddings == 60
    assert not config.tie_word_embeddings
    assert config.text_config.tie_word_embeddings


def test_a_native_config_is_restored_to_what_it_came_from():
    config = convert_config(RAW, SHAPES, tied=True, image_token_id=5)
    raw = restore_config(config, make_generation_config({}))
    again = convert_config(raw, SHAPES, tied=True, image_token_id=5)
    assert again.to_dict() == config.to_dict()


def test_a_checkpoint_without_position_table_is_named():
    shapes = {name: shape for name, shape in SHAPES.items() if "embed_positions" not in name}
    with pytest.raises(CaptionTrainError, match="embed_positions"):
        convert_config(RAW, shapes, tied=True, image_token_id=5)


def test_scaled_embeddings_are_refused():
    raw = RAW | {"text_config": RAW["text_config"] | {"scale_embedding": True}}
    with pytest.raises(CaptionTrainError, match="scale_embedding"):
        convert_config(raw, SHAPES, tied=True, image_token_id=5)

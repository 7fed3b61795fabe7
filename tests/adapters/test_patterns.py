"""Regular expressions in an adapter_config.json, which anybody may have written."""

import time

import pytest

from caption_train.adapters import patterns
from caption_train.adapters.patterns import check_patterns
from caption_train.errors import CaptionTrainError

NAMES = ["vision_model.encoder.layers.0.self_attn.qkv", "text_decoder.bert.encoder.layer.1.output.dense"] * 20
SLOW = r"(\w+\.?)*\.nothing"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"modules_to_save": [SLOW]},
    ],
)
def test_an_expression_that_takes_for_ever_is_refused_within_seconds(config, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(CaptionTrainError, match=f"{next(iter(config))} .*takes longer than") as error:
        check_patterns(config, NAMES, "lora")
    assert time.monotonic() - began < 5 and "\n" not in str(error.value)


def test_a_broken_expression_is_refused():
    with pytest.raises(CaptionTrainError, match=r"exclude_modules.*is no regular expression"):
        check_patterns({"exclude_modules": "(a"}, NAMES, "lora")
    with pytest.raises(CaptionTrainError, match="has 30,000 characters"):
        check_patterns({"target_modules": "a" * 30_000}, NAMES, "lora")


def test_lists_and_usual_expressions_pass():
    usual = {"target_modules": r".*\.(qkv|dense)", "rank_pattern": {"qkv": 4}, "layers_pattern": "layers"}
    check_patterns(usual, NAMES, "lora")
    check_patterns({"target_modules": ["qkv"], "exclude_modules": None, "rank_pattern": None}, NAMES, "lora")

"""A Moondream 2 of under two million weights: the real one's crops and vision layers, but 9 large patches."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from caption_train.families.moondream.config import (
    MoondreamConfig,
    make_text_config,
    make_vision_config,
)
from caption_train.families.moondream.generation import make_generation_config
from caption_train.families.moondream.model import MoondreamForConditionalGeneration
from caption_train.families.moondream.processor import CAPTION_TASKS, MoondreamProcessor
from examples.scenes import sample_scene
from examples.styles import STYLES, write_caption

VOCABULARY = 512
TEXT = {"dim": 128, "ff_dim": 256, "n_layers": 3, "vocab_size": VOCABULARY}
VISION = {"enc_dim": 24, "enc_n_heads": 1, "enc_ff_dim": 48, "enc_patch_size": 126}
TRAINED_LAYERS = 2
"""Vision layers that pretraining trains. The others, of 27, let their input through almost unchanged."""

REGION = {
    "dim": 128,
    "coord_feat_dim": 8,
    "coord_out_dim": 16,
    "size_feat_dim": 8,
    "size_out_dim": 16,
    "inner_dim": 16,
}
SPECIAL_TOKENS = ["<|endoftext|>", *(f"<|md_reserved_{i}|>" for i in range(9))]
TASK_STYLES = {"plain": "normal", "detailed": "long", "colours": "short"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on captions and prompts of scenes, with the special tokens of starmie-v1."""
    rng = np.random.default_rng(0)
    texts = ["describe", "query", "short", "normal", "long"] * 50
    texts += [style.prompt for style in STYLES.values()] * 50
    texts += [write_caption(sample_scene(rng), style, rng) for style in STYLES for _ in range(300)]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        texts, vocab_size=VOCABULARY - 8, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    end = SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )


def make_templates(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Token ids around a caption task or a question, in the form of starmie-v1's."""

    def ids(word: str) -> list[int]:
        return tokenizer(word, add_special_tokens=False)["input_ids"]

    return {
        "caption": {task: [1, *ids("describe"), 2, *ids(task), 3] for task in CAPTION_TASKS},
        "query": {"prefix": [1, *ids("query"), 2], "suffix": [3]},
    }


def make_config(tokenizer: PreTrainedTokenizerFast) -> MoondreamConfig:
    """27 vision layers, crops of 378 pixels and heads of 64 as the official code demands them.

    Not its patches of 14 pixels: a patch of 126 pixels sees a shape whole. What became of the others is in
    examples/README.md.
    """
    return MoondreamConfig(
        text_config=make_text_config(TEXT),
        vision_config=make_vision_config(VISION),
        projector_dim=128,
        region=REGION,
        overlap_margin=1,
        bos_token_id=0,
        answer_token_id=3,
        templates=make_templates(tokenizer),
    )


def make_model() -> tuple[MoondreamForConditionalGeneration, MoondreamProcessor]:
    """A model with random weights, and its processor."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    model = MoondreamForConditionalGeneration(config)
    model.generation_config = make_generation_config(config)
    for layer in model.model.vision_tower.encoder.layers[TRAINED_LAYERS:]:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.normal_(last.weight, std=1e-4)
            nn.init.zeros_(last.bias)
    return model, MoondreamProcessor.from_config(config, tokenizer)


@torch.no_grad()
def generate(model, processor, images: list[Image.Image], style: str) -> list[str]:
    """Caption images greedily, asked for one style."""
    prompt = TASK_STYLES.get(style) or STYLES[style].prompt
    captions = []
    for start in range(0, len(images), 16):
        batch = processor(images[start : start + 16], [prompt] * len(images[start : start + 16]))
        sequences = model.generate(**batch, max_new_tokens=80)[:, batch["input_ids"].shape[1] :]
        captions += processor.batch_decode(sequences, skip_special_tokens=True)
    return captions

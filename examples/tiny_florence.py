"""A Florence-2 of almost two million weights, with the classes, names and files of the real one."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartTokenizer,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
)

from examples.pretrain import TinyFamily
from examples.scenes import sample_scene
from examples.styles import STYLES, write_caption

SIDE = 96  # pixels
VOCABULARY = 480
WIDTH = 128
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
# The parsers a Florence-2 processor looks up by name; only `pure_text` is of use for captions.
POST_PROCESSOR_CONFIG = {
    "ocr": {
        "pattern": "(.+?)" + r"<loc_(\d+)>" * 8,
        "area_threshold": 0.0,
    },
    "phrase_grounding": {"banned_grounding_tokens": ["it", "the image", "image", "the", "a", "an"]},
    "pure_text": {},
    "description_with_bboxes": {},
    "description_with_polygons": {},
    "polygons": {},
    "bboxes": {},
    "description_with_bboxes_or_polygons": {},
}


def make_tokenizer() -> BartTokenizer:
    """Byte-level BPE learned on captions and prompts of scenes; every text can be written with it."""
    rng = np.random.default_rng(0)
    texts = [style.prompt for style in STYLES.values()] * 50
    texts += [write_caption(sample_scene(rng), style, rng) for style in STYLES for _ in range(300)]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return BartTokenizer(
        vocab=model["vocab"],
        merges=merges,
        model_max_length=256,
        extra_special_tokens={"image_token": "<image>"},
    )


def make_processor() -> Florence2Processor:
    """The full processor: PIL images to 96 × 96 pixels, `<image>` repeated once per image feature."""
    image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    image_processor.image_seq_length = (SIDE // 32) ** 2 + 1
    return Florence2Processor(image_processor, make_tokenizer(), post_processor_config=POST_PROCESSOR_CONFIG)


def make_config(processor: Florence2Processor) -> Florence2Config:
    """DaViT of four stages of one block, BART of two and two layers; no dropout, the scenes never run out."""
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [32, 64, 96, WIDTH],
        "num_heads": [1, 2, 3, 4],
        "num_groups": [1, 2, 3, 4],
        "window_size": 6,
        "drop_path_rate": 0.0,
        "projection_dim": WIDTH,
    }
    text = {
        "model_type": "bart",
        "vocab_size": len(processor.tokenizer),
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    return Florence2Config(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )


def make_model() -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    """A model with random weights, and its processor."""
    processor = make_processor()
    model = Florence2ForConditionalGeneration(make_config(processor))
    # Greedy, and without the real model's ban on repeated trigrams: "large red circle" may well occur twice.
    model.generation_config = GenerationConfig(
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_bos_token_id=0
    )
    return model, processor


def make_batch(processor, images: list[Image.Image], styles: list[str], captions: list[str]) -> dict:
    """Prompts with images, labels `<s> … </s>` (B, T); pads of the labels are -100."""
    prompts = [STYLES[style].prompt for style in styles]
    batch = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    labels = processor.tokenizer(captions, padding=True, return_tensors="pt")
    batch["labels"] = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
    return dict(batch)


@torch.no_grad()
def generate(model, processor, images: list[Image.Image], style: str) -> list[str]:
    """Caption images greedily, asked for one style."""
    inputs = processor(text=[STYLES[style].prompt] * len(images), images=images, return_tensors="pt")
    return processor.batch_decode(model.generate(**inputs, max_new_tokens=80), skip_special_tokens=True)


FLORENCE = TinyFamily(
    name="florence2-tiny",
    make=make_model,
    make_batch=make_batch,
    feature_module=lambda model: model.model.multi_modal_projector,
    feature_width=lambda model: model.config.vision_config.projection_dim,
    generate=generate,
    steps=1500,
    batch_size=32,
    learning_rate=1.5e-3,
)

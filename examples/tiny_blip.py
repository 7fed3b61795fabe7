"""A BLIP of over a million weights, with the classes, names, files and special token ids of the real one."""

from __future__ import annotations

import string

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from examples.pretrain import TinyFamily
from examples.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES
from examples.styles import STYLES

SIDE = 96  # pixels
PATCH = 32  # one cell of the grid on which the scenes are laid out
WIDTH = 128
CLS, SEP, MASK, UNK = 101, 102, 103, 100  # where BERT's vocabulary has them
SENTENCE_WORDS = """
    a an and at background bottom color coloured colours describe detail image in is left of on one paragraph
    picture right shape shapes shows size tags the there to top two with word words below
"""


def make_tokenizer() -> BertTokenizer:
    """WordPiece of letters, digits, marks and the words of the scenes, with BERT's ids for its specials."""
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.digits + string.ascii_lowercase
    tokens += [*string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    words = {*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *SENTENCE_WORDS.split(), *" ".join(RELATIONS).split()}
    tokens += sorted(words - set(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocab, model_max_length=256)


def make_processor() -> BlipProcessor:
    """The full processor: PIL images to 96 × 96 pixels."""
    return BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), make_tokenizer())


def make_config(vocabulary: int) -> BlipConfig:
    """ViT of four layers, BERT decoder of two; `[DEC]` and `[ENC]` follow the tokenizer's vocabulary."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.02,
        "projection_dim": WIDTH,
    }
    text = {
        "vocab_size": vocabulary + 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "projection_dim": WIDTH,
        "bos_token_id": vocabulary,
        "sep_token_id": SEP,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return BlipConfig(
        text_config=text, vision_config=vision, projection_dim=WIDTH, image_text_hidden_size=WIDTH
    )


def make_model() -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """A model with random weights, and its processor."""
    processor = make_processor()
    model = BlipForConditionalGeneration(make_config(len(processor.tokenizer)))
    # The default starts all positions alike, and "left of" is then learned late.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.5)
    return model, processor


def make_batch(processor, images: list[Image.Image], styles: list[str], captions: list[str]) -> dict:
    """Prefix and caption from `[DEC]` to `[SEP]` (B, T); only the caption and its end are in the labels.

    With the prefix in the labels a model would begin with a prefix of its own accord; this way, without one
    it only knows the plain style.
    """
    tokenizer = processor.tokenizer
    prefixes = [STYLES[style].prefix for style in styles]
    texts = [f"{prefix} {caption}" for prefix, caption in zip(prefixes, captions, strict=True)]
    batch = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prefix in enumerate(prefixes):
        labels[row, : 1 + len(tokenizer.tokenize(prefix))] = -100
    batch["input_ids"][:, 0] = len(tokenizer)
    return {**batch, "labels": labels}


@torch.no_grad()
def generate(model, processor, images: list[Image.Image], style: str) -> list[str]:
    """Caption images greedily, continuing one style's prefix; the prefix is cut off."""
    prefix = STYLES[style].prefix
    inputs = processor(images=images, text=[prefix] * len(images), return_tensors="pt")
    length = inputs["input_ids"].shape[1] - 1  # generate drops the last token, [SEP]
    tokens = model.generate(**inputs, max_new_tokens=80)
    return processor.batch_decode(tokens[:, length:], skip_special_tokens=True)


BLIP = TinyFamily(
    name="blip-tiny",
    make=make_model,
    make_batch=make_batch,
    feature_module=lambda model: model.vision_model,
    feature_width=lambda model: model.config.vision_config.hidden_size,
    generate=generate,
    steps=1800,
    batch_size=64,
    learning_rate=1.5e-3,
)

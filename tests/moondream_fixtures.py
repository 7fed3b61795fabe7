"""The shared Moondream fixture, official folders written from it, and a small model with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from caption_train.families import get_family

FAMILY = get_family("moondream")

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "moondream"
CHECKPOINT = FIXTURES / "tiny_mha"
IMAGES = ("square_600x600", "wide_900x450", "tall_500x900", "gray_200x120")
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"{FIXTURES} is not there")


def read_json(name: str) -> dict:
    return json.loads((FIXTURES / name).read_text()) if FIXTURES.is_dir() else {}


def read_tensors(name: str = "tiny_mha/model") -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors") if FIXTURES.is_dir() else {}


def open_fixture_image(name: str) -> Image.Image:
    return Image.open(FIXTURES / "images" / f"{name}.png")


def write_folder(folder: Path, tensors: dict, config: dict, shards: int = 1) -> Path:
    """Write an official folder with the fixture's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(CHECKPOINT / "tokenizer.json", folder / "tokenizer.json")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def make_small_model(**changes):
    """A model of two vision layers and 9 image tokens, and its processor: fast, but otherwise all there."""
    from caption_train.families.moondream.config import (
        MoondreamConfig,
        make_text_config,
        make_vision_config,
    )
    from caption_train.families.moondream.model import MoondreamForConditionalGeneration
    from caption_train.families.moondream.processor import MoondreamProcessor
    from examples.tiny_moondream import REGION, VOCABULARY, make_templates, make_tokenizer

    tokenizer = make_tokenizer()
    text = {"dim": 128, "ff_dim": 64, "n_layers": 2, "vocab_size": VOCABULARY}
    vision = {"enc_dim": 24, "enc_n_heads": 2, "enc_ff_dim": 32, "enc_n_layers": 2, "crop_size": 42}
    fields = {
        "text_config": make_text_config(text | changes.pop("text", {})),
        "vision_config": make_vision_config(vision),
        "projector_dim": 32,
        "region": REGION,
        "overlap_margin": 1,
        "answer_token_id": 3,
        "templates": make_templates(tokenizer),
    }
    torch.manual_seed(0)
    model = MoondreamForConditionalGeneration(MoondreamConfig(**fields | changes)).eval()
    return model, MoondreamProcessor.from_config(model.config, tokenizer)


SIZES = ((60, 44), (30, 20), (90, 200))
CAPTIONS = ("a red circle", "a green square above a small red circle", "blue")
PROMPTS = ("normal", "What is above the circle?", "long")


def make_items():
    """Three images of different tilings, each with a caption and a prompt of its own."""
    torch.manual_seed(1)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in SIZES]
    return [
        {"image": image, "caption": caption, "prompt": prompt}
        for image, caption, prompt in zip(images, CAPTIONS, PROMPTS, strict=True)
    ]


def collate(processor, items, max_length=64):
    return FAMILY.make_collator(processor, prompt="normal", max_length=max_length)(items)


def encode(processor, items):
    return FAMILY.encode(processor, [item["image"] for item in items], [item["prompt"] for item in items])


def answer(model, processor, batch, **settings):
    return [g.token_ids for g in FAMILY.generate(model, processor, batch, max_new_tokens=12, **settings)]

"""Real runs small enough for a test: random tiny bases, a handful of pictures."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_bases import make_moondream

from caption_train.config.training import TrainOptions
from caption_train.families import get_family
from caption_train.training.prepare import prepare_training
from examples import tiny_blip, tiny_florence

MODELS = {"blip": tiny_blip.make_model, "florence": tiny_florence.make_model, "moondream": make_moondream}
WORDS = ("small", "large", "red", "blue", "circle", "square", "left", "right")


def save_base(family: str, folder: Path) -> Path:
    """Save a family's tiny model with random weights; without dropout, so that two runs can be compared."""
    torch.manual_seed(0)
    model, processor = MODELS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_pairs(folder: Path, count: int, seed: int = 0) -> Path:
    """Write `count` pictures of noise, each with a caption of one to eight words."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        words = rng.choice(WORDS, rng.integers(1, 9))
        (folder / f"{index:02d}.txt").write_text(", ".join(words))
    return folder


def make_options(family: str, base: Path, dataset_dir: Path, output_dir: Path, **changes) -> TrainOptions:
    """Return the options of a small run on the CPU, dropout off."""
    settings = {
        "model_id": str(base),
        "target_modules": list(get_family(family).lora_target_modules),
        "dataset_dir": dataset_dir,
        "output_dir": output_dir,
        "device": "cpu",
        "learning_rate": 1e-3,
        "dropout": 0.0,
        "rank": 4,
        "batch_size": 2,
        "epochs": 2,
        **changes,
    }
    return TrainOptions(**settings)


_kept = []
"""This process's trainers: a rank must not take its group apart while the other still holds on to it."""


def train(family: str, options: TrainOptions) -> dict:
    """Train as the script does; return the summary."""
    trainer = prepare_training(options, get_family(family))
    _kept.append(trainer)
    return trainer.train()


def read_log(output_dir: Path) -> list[dict]:
    """Return what the run logged, a dict a step."""
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Hold two finished runs to the same log and the same weights, bit for bit."""
    assert read_log(one) == read_log(other)
    weights, others = (load_file(next(folder.glob("*model.safetensors"))) for folder in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name

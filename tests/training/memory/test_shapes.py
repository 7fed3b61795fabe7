"""Activations measured without weights are those measured with them."""

import pytest
import torch
from PIL import Image

from caption_train.config.training import TrainOptions
from caption_train.families import get_family
from caption_train.training.distributed.accelerator import make_accelerator
from caption_train.training.memory.activations import measure_activations
from caption_train.training.memory.shapes import ShapesOnly
from caption_train.training.model import load_trainable
from caption_train.training.plan_command import _measure
from tests.fixtures.vlm import KINDS

KINDS = [kind for kind in KINDS if kind not in ("joycaption", "llava_vicuna", "idefics3")]


@pytest.fixture
def load(tiny_base):
    """`load(kind, is_empty)`: options, a family's facts, and a model made trainable with its batch."""
    family = get_family("vlm")

    def run(kind, is_empty, **changes):
        folder = tiny_base(f"vlm/{kind}")
        facts = family.describe(str(folder))
        options = TrainOptions(
            device="cpu",
            output_dir=folder,
            dataset_dir=folder,
            model_id=str(folder),
            target_modules=list(facts.lora_target_modules),
            memory_budget="1GB",
            **{"train_parts": ["language"]} | changes,
        )
        accelerator = make_accelerator(options)
        model, processor = load_trainable(options, family, facts, accelerator, is_empty=is_empty)
        item = {"image": Image.effect_noise((96, 64), 90).convert("RGB"), "caption": "a red circle"}
        return options, facts, model, family.make_collator(processor, prompt="What?", max_length=32)([item])

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_the_same_without_weights(load, kind):
    options, facts, model, batch = load(kind, False)
    real = _measure(model, facts.parts, batch, options)
    options, facts, model, batch = load(kind, True)
    shapes = ShapesOnly()
    shapes.hollow(model)
    with shapes:
        empty = _measure(model, facts.parts, batch, options)
    assert real == empty and real.keys() == {"no", "bf16", "quantized"}


@pytest.mark.parametrize("changes", [{"train_method": "full"}, {"train_parts": ["vision", "language"]}])
def test_so_are_those_of_other_parts_and_of_every_weight(load, changes):
    _, _, model, batch = load("qwen3_vl", False, **changes)
    real = measure_activations(model.train(), batch)
    _, _, model, batch = load("qwen3_vl", True, **changes)
    shapes = ShapesOnly()
    shapes.hollow(model)
    with shapes:
        assert measure_activations(model.train(), batch) == real


def test_tied_weights_stay_tied_and_nothing_has_data():
    embedding = torch.nn.Embedding(4, 2, device="meta")
    head = torch.nn.Linear(2, 4, bias=False, device="meta")
    head.weight = embedding.weight
    model, shapes = torch.nn.Sequential(embedding, head), ShapesOnly()
    shapes.hollow(model)
    assert model[0].weight is model[1].weight
    with shapes:
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 4)

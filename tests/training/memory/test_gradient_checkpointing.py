"""Gradient checkpointing changes memory, and nothing else."""

import copy
import importlib

import pytest
import torch
from PIL import Image

from caption_train.adapters.lora import wrap_with_lora
from caption_train.families import get_family
from caption_train.training.memory.gradient_checkpointing import (
    enable_checkpointing,
    find_unreached_blocks,
)
from tests.fixtures.runs import MODELS, save_base


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """A LoRA on random weights in train mode, with all its dropout, and a batch."""
    family = get_family(request.param)
    folder = save_base(family.name, tmp_path_factory.mktemp(family.name))
    model, processor = family.load(str(folder))
    torch.manual_seed(0)
    model = wrap_with_lora(model, family.facts.lora_target_modules, rank=4, alpha=8, dropout=0.1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    images = [Image.effect_noise((96, 96), 90).convert("RGB") for _ in range(2)]
    items = [{"image": image, "caption": "a red circle above a green square"} for image in images]
    batch = family.make_collator(processor, prompt=family.facts.default_prompt, max_length=32)(items)
    return model.train(), batch


def backward(model: torch.nn.Module, batch: dict) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return the loss, the gradients, and the bytes of activations kept for the backward pass."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, activations


def test_losses_and_gradients_stay_the_same_to_the_bit(trained):
    model, batch = trained
    plain = copy.deepcopy(model)
    checkpointed = copy.deepcopy(model)
    enable_checkpointing(checkpointed)
    loss, gradients, kept = backward(plain, batch)
    loss_again, gradients_again, kept_again = backward(checkpointed, batch)
    assert loss_again == loss
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, f"{name} has no gradient"
        assert torch.equal(gradients_again[name], gradient), name
    assert kept_again < 0.5 * kept


def test_a_model_in_eval_mode_keeps_its_own_forward(trained, caplog):
    model, batch = trained
    model = copy.deepcopy(model)
    enable_checkpointing(model)
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
    assert not caplog.records


def test_blocks_transformers_does_not_reach_are_found():
    florence, _ = importlib.import_module("examples.tiny_florence").make_model()
    kinds = {type(block).__name__ for block in find_unreached_blocks(florence)}
    assert kinds == {"Florence2VisionConvEmbed", "Florence2VisionBlock"}
    blip, _ = importlib.import_module("examples.tiny_blip").make_model()
    assert not list(find_unreached_blocks(blip))

"""Features belong to a tower by everything that makes a difference to them."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from caption_train.features.encoder import fingerprint_encoder


def make_tower(**settings) -> nn.Module:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(4, 4))
    return get_peft_model(tower, LoraConfig(r=2, target_modules=["0"], **settings)) if settings else tower


def test_an_adapter_in_the_tower_counts_by_its_strength_too():
    """The same tensors with another alpha, or scaled by the square root of the rank, are another tower."""
    towers = [{}, {"lora_alpha": 2}, {"lora_alpha": 4}, {"lora_alpha": 2, "use_rslora": True}]
    found = [fingerprint_encoder([make_tower(**settings)], {}) for settings in towers]
    assert len(set(found)) == len(towers)
    assert found == [fingerprint_encoder([make_tower(**settings)], {}) for settings in towers]

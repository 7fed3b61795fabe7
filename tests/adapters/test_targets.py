"""Training some parts only, in words: what they come to in each family."""

import importlib
import re

import pytest
import torch

from caption_train.adapters.lora import wrap_with_lora
from caption_train.adapters.targets import choose_targets, freeze_outside
from caption_train.errors import UsageError
from caption_train.families import get_family

FAMILIES = ("blip", "florence")
PARTS = ("vision", "projector", "language")


@pytest.fixture(params=FAMILIES)
def family(request):
    return get_family(request.param)


def make_model(family) -> torch.nn.Module:
    return importlib.import_module(f"examples.tiny_{family.name}").make_model()[0]


def add_lora(model, family, parts):
    patterns = [family.facts.parts[part] for part in parts]
    return wrap_with_lora(
        model, family.facts.lora_target_modules, rank=4, alpha=8, dropout=0.0, parts=patterns
    )


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_gets_a_lora(family, part):
    model = add_lora(make_model(family), family, [part])
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained(model)}
    assert modules and all(re.fullmatch(family.facts.parts[part], module) for module in modules)


def test_the_parts_together_train_what_the_whole_trains_and_the_projector(family):
    whole = trained(add_lora(make_model(family), family, []))
    parts = [trained(add_lora(make_model(family), family, [part])) for part in PARTS]
    assert not any(a & b for a in parts for b in parts if a is not b)
    assert trained(add_lora(make_model(family), family, PARTS)) == set().union(*parts) >= whole


@pytest.mark.parametrize("part", PARTS)
def test_full_training_freezes_the_rest(family, part):
    model = make_model(family)
    everything = trained(model)
    freeze_outside(model, [])
    assert trained(model) == everything
    freeze_outside(model, [family.facts.parts[part]])
    assert set() < trained(model) < everything
    assert all(re.fullmatch(family.facts.parts[part], name.rpartition(".")[0]) for name in trained(model))


def test_a_part_that_is_not_in_the_model_is_one_line(family):
    with pytest.raises(UsageError, match="--train_parts"):
        choose_targets(make_model(family), ["query"], ["audio_tower.*"])

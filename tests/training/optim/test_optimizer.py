"""Which learning rate each trained weight gets."""

import pytest
import torch

from caption_train.adapters.lora import wrap_with_lora
from caption_train.adapters.targets import find_part, freeze_outside
from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer
from tests.fixtures.network import make_options
from tests.fixtures.runs import MODELS

RATES = ["vision=1e-4", "projector=1e-3"]


def make_model(family, train_method, train_parts=()):
    """Return a model that is trainable as a run would make it."""
    model, facts = MODELS[family]()[0], get_family(family).facts
    parts = [facts.parts[part] for part in train_parts]
    if train_method == "full":
        freeze_outside(model, parts)
        return model
    targets = list(facts.lora_target_modules)
    return wrap_with_lora(model, targets, rank=4, alpha=4, dropout=0.0, parts=parts)


def read_rates(family, model, **changes):
    """Return part (None without a rate of its own) → rates, of all trained parameters."""
    parts = get_family(family).facts.parts
    optimizer = make_optimizer(make_options(**changes), model, parts)
    by_parameter = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert by_parameter.keys() == set(trained.values())
    rates = {}
    for name, p in trained.items():
        rates.setdefault(find_part(name, parts), set()).add(by_parameter[p])
    return rates


@pytest.mark.parametrize("optimizer_name", ["AdamW", "Flora"])
@pytest.mark.parametrize("train_method", ["lora", "full"])
@pytest.mark.parametrize("family", MODELS)
def test_a_part_with_a_rate_of_its_own_gets_it_and_the_others_get_the_run_s(
    family, train_method, optimizer_name
):
    model = make_model(family, train_method, ["vision", "projector", "language"])
    rates = read_rates(family, model, optimizer_name=optimizer_name, part_learning_rates=RATES)
    assert rates == {"vision": {1e-4}, "projector": {1e-3}, "language": {1e-2}}


def test_lora_plus_multiplies_the_rate_of_the_part():
    model = make_model("blip", "lora")
    rates = read_rates("blip", model, lora_plus_ratio=16, part_learning_rates=["vision=1e-4"])
    assert rates["vision"] == {1e-4, 16e-4} and rates["language"] == {1e-2, 16e-2}


def test_the_rate_that_a_run_shows_is_not_a_part_s_if_there_are_others():
    parts = get_family("blip").facts.parts
    options = make_options(part_learning_rates=["vision=1e-4"], scheduler="constant")
    optimizer = make_optimizer(options, make_model("blip", "lora"), parts)
    assert make_lr_scheduler(options, optimizer, 3).get_last_lr() == [1e-2, 1e-4]


def test_a_rate_for_a_part_that_is_not_trained_is_refused():
    model = make_model("blip", "lora", ["language"])
    with pytest.raises(UsageError, match="--part_learning_rates: nothing is trained in vision"):
        read_rates("blip", model, part_learning_rates=["vision=1e-4"])


def test_a_step_moves_a_part_by_its_rate():
    torch.manual_seed(0)
    model = make_model("blip", "full")
    parts = get_family("blip").facts.parts
    options = make_options(part_learning_rates=["vision=1e-4"], weight_decay=0.0)
    optimizer = make_optimizer(options, model, parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-4 if find_part(name, parts) == "vision" else 1e-2, rel=1e-2), name

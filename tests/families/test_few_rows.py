"""A linear layer takes few rows another way on a CPU: the same products up to rounding, nothing else."""

import pytest
import torch

from caption_train.families import get_family
from caption_train.families.decoding import few_rows
from tests.fixtures.photos import draw_photo


@pytest.fixture
def taken(monkeypatch):
    """Let every layer be large enough; returns the rows that were taken the other way."""
    rows, multiply = [], few_rows.multiply_columns
    monkeypatch.setattr(few_rows, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(few_rows.torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(
        few_rows,
        "multiply_columns",
        lambda layer, states: rows.append(states.shape[:-1].numel()) or multiply(layer, states),
    )
    return rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (5,), (2, 2, 1)])
def test_the_product_is_the_same_and_lies_in_order(taken, bias, shape):
    layer = torch.nn.Linear(32, 48, bias=bias)
    states = torch.randn(*shape, 32)
    wanted = layer(states)
    few_rows.speed_up_few_rows(torch.nn.Sequential(layer))
    found = layer(states)
    assert taken and found.is_contiguous() and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.allclose(layer(states), wanted)


def test_other_rows_precisions_and_small_layers_are_taken_as_usual(taken, monkeypatch):
    layer = torch.nn.Linear(32, 48)
    few_rows.speed_up_few_rows(layer)
    for rows in (0, 1, 2, 6, 64):
        assert layer(torch.randn(rows, 1, 32)).shape == (rows, 1, 48)
    half = torch.nn.Linear(32, 48).bfloat16()
    few_rows.speed_up_few_rows(half)
    half(torch.randn(4, 32).bfloat16())
    monkeypatch.setattr(few_rows, "FEWEST_WEIGHTS", 32 * 48 + 1)
    small = torch.nn.Linear(32, 48)
    few_rows.speed_up_few_rows(small)
    assert "forward" not in vars(small) and taken == []


def test_scores_of_a_vocabulary_are_taken_so_for_larger_batches_too(taken, monkeypatch):
    monkeypatch.setattr(few_rows, "VOCABULARY", 48)
    layer = torch.nn.Linear(32, 48)
    few_rows.speed_up_few_rows(layer)
    for rows in (1, 2, 16, 65):
        layer(torch.randn(rows, 32))
    assert taken == [2, 16]


@pytest.mark.parametrize("name", ["blip", "florence"])
def test_captions_stay_the_same(taken, tiny_base, name):
    family, tokens = get_family(name), []
    for is_fast in (False, True):
        model, processor = family.load(str(tiny_base(name)))
        if is_fast:
            family.speed_up(model)
        batch = family.encode(processor, [draw_photo(n) for n in range(4)], [family.facts.default_prompt] * 4)
        settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": 1}
        with torch.inference_mode():
            found = family.generate(model, processor, batch, **settings)
        tokens.append([row.token_ids for row in found])
    assert tokens[0] == tokens[1] and taken.count(4) > 12


def test_an_adapter_on_a_layer_counts(taken):
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(32, 48))
    few_rows.speed_up_few_rows(model)
    model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    states = torch.randn(4, 32)
    beside, merged = model(states), model.merge_and_unload()(states)
    assert len(taken) == 2
    torch.testing.assert_close(beside, merged)

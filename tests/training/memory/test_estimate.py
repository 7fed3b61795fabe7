"""Memory estimates against the memory that is really held."""

import math

import pytest
import torch
from PIL import Image

from benchmarks.memory import count
from caption_train.config.training import TrainOptions
from caption_train.config.values import parse_bytes
from caption_train.families import get_family
from caption_train.training.distributed.accelerator import accumulate, make_accelerator
from caption_train.training.memory.activations import RECOMPUTED_GRADIENTS, measure_activations
from caption_train.training.memory.estimate import MARGIN, Planner
from caption_train.training.memory.gradient_checkpointing import enable_checkpointing
from caption_train.training.model import load_trainable
from caption_train.training.optim.optimizer import make_optimizer
from tests.fixtures.runs import MODELS, save_base

FLORA = {"optimizer_name": "Flora", "optimizer_rank": 4, "accumulation_rank": 4}


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """A family, the folder of a model with random weights, and a batch of one image."""
    family, folder = get_family(request.param), save_base(request.param, tmp_path_factory.mktemp("base"))
    _, processor = family.load(str(folder))
    item = {"image": Image.effect_noise((96, 96), 90).convert("RGB"), "caption": "a red circle"}
    return (
        family,
        folder,
        family.make_collator(processor, prompt=family.facts.default_prompt, max_length=32)([item]),
    )


def load(base, **changes):
    family, folder, _ = base
    options = TrainOptions(
        device="cpu",
        output_dir=folder,
        dataset_dir=folder,
        model_id=str(folder),
        target_modules=list(family.facts.lora_target_modules),
        **changes,
    )
    accelerator = make_accelerator(options)
    return options, accelerator, load_trainable(options, family, family.facts, accelerator)[0]


@pytest.fixture(scope="module")
def planners(base):
    """A planner for each `--train_method`."""
    family, _, batch = base
    found = {}
    for method in ("lora", "full"):
        model = load(base, train_method=method)[2]
        measured = measure_activations(model.train(), batch)
        found[method] = Planner(
            model, family.facts.parts, {"no": measured, "bf16": measured, "quantized": measured}
        )
    return found


def held_bytes(tensors) -> int:
    """Bytes of the tensors' storages, each counted once; a 4-bit weight's scales are its."""
    found = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        scales = [state.absmax, state.state2.absmax] if state else [getattr(tensor, "SCB", None)]
        for part in (tensor, *scales):
            if isinstance(part, torch.Tensor):
                found[part.data_ptr()] = part.nbytes
    return sum(found.values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantize": "4bit"}, {"quantize": "8bit"}, {"mixed_precision": "bf16"}, {"train_method": "full"}]
    + [{"quantize": "4bit", "quantize_parts": ["language"]}],
)
def test_weights_are_counted_as_they_are_held(base, planners, changes):
    options, _, model = load(base, **changes)
    planned = planners[options.train_method].count_weights(options)
    assert planned == pytest.approx(held_bytes(model.parameters()), rel=0.005)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "changes", [{}, {"optimizer_name": "AdamW8bit"}, FLORA, {**FLORA, "accumulation_compression": True}]
)
def test_gradients_and_state_are_counted_as_they_are_held(base, planners, changes, method):
    options, accelerator, model = load(base, train_method=method, **changes)
    model, optimizer = accelerator.prepare(model, make_optimizer(options, model))
    with accumulate(accelerator, model.train(), last=True):
        accelerator.backward(model(**base[2]).loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = held_bytes([*getattr(accelerator, "packs", {}).values(), *(p.grad for p in trained)])
    accelerator.clip_grad_norm_(trained, math.inf)
    optimizer.step()
    state = held_bytes(value for values in optimizer.state.values() for value in values.values())
    plan = planners[method].plan(options)
    assert plan.gradients == pytest.approx(gradients, rel=0.005)
    assert plan.state == pytest.approx(state, rel=0.03)


def test_activations_are_what_autograd_keeps(base):
    _, _, model = load(base)
    measured = measure_activations(model.train(), base[2])
    for is_checkpointed in (False, True):
        if is_checkpointed:
            enable_checkpointing(model)
        kept = {}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**base[2]).loss
        real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
        del loss
        expected = measured.held(checkpointing=is_checkpointed)
        if is_checkpointed:
            expected -= int((1 + RECOMPUTED_GRADIENTS) * max(measured.blocks))
        assert expected == pytest.approx(real, rel=0.1)


def test_the_cheapest_flags_that_fit_are_found(base, planners):
    options, _, _ = load(base)
    planner = planners["lora"]
    whole = planner.plan(options).peak
    assert planner.find_cheapest(options, int(whole * MARGIN) + 1)[2] == []
    changed, plan, flags = planner.find_cheapest(options, int(whole * MARGIN * 0.95))
    assert plan.peak <= whole * 0.95 and len(flags) == 1 and not changed.check()
    _, smallest, flags = planner.find_cheapest(options, 0)
    assert "--quantize" in flags and smallest.peak < 0.7 * whole


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("7.5 GiB", int(7.5 * 2**30)), ("900mb", 900 * 10**6), ("8", None), ("GB", None)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


def test_a_budget_without_a_plan_is_refused():
    problems = TrainOptions(dataset_dir=".", output_dir=".", memory_budget="8").check()
    assert [p for p in problems if "--plan" in p] and [p for p in problems if "no size" in p]


def test_flora_holds_its_bars_at_true_size():
    state, gradients = count("florence-base")["Flora 16"]
    assert state <= 0.15 and gradients <= 0.10

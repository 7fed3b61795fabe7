"""The table of combinations: what is not refused trains, what is refused says why."""

import itertools
import math
import os
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from caption_train.adapters.initialization import start_from_inputs
from caption_train.config.compatibility import REFUSALS, check, make_table
from caption_train.config.training import OPTIMIZERS, TrainOptions
from caption_train.families import get_family
from caption_train.training.distributed.accelerator import accumulate, make_accelerator
from caption_train.training.model import load_trainable
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer
from tests.fixtures.forked import start, start_ranks
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.runs import MODELS, save_base, train, write_pairs
from tests.fixtures.runs import make_options as make_run_options

AXES = {
    "optimizer_name": OPTIMIZERS,
    "accumulation_compression": (False, True),
    "gradient_checkpointing": (False, True),
    "activation_checkpointing": (False, True),
    "quantize": (None, "4bit", "8bit"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "train_method": ("lora", "full"),
    "dora": (False, True),
    "rslora": (False, True),
    "lora_plus_ratio": (None, 4.0),
    "init_lora_weights": (None, "gaussian", "pissa", "eva"),
}
SETUPS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def make_options(**changes) -> TrainOptions:
    few = {"device": "cpu", "output_dir": "unused", "optimizer_rank": 4, "accumulation_rank": 4, "rank": 8}
    return TrainOptions(**{**few, "dataset_dir": "unused", "learning_rate": 1e-3, **changes})


SUPPORTED = [setup for setup in SETUPS if not make_options(**setup).check()]


def cover_pairs(setups: list[dict]) -> list[dict]:
    """Return a few setups in which every pair of values of two axes occurs that occurs in all of them."""
    pairs = [{*itertools.combinations(setup.items(), 2)} for setup in setups]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(setups)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.append(setups[best])
    return chosen


# All of them take minutes: ALL_COMBINATIONS=1 pytest tests/config/test_compatibility.py
LAUNCHED = SUPPORTED if os.environ.get("ALL_COMBINATIONS") else cover_pairs(SUPPORTED)


def describe(setup: dict) -> str:
    return " ".join(str(value if value is not True else name) for name, value in setup.items() if value)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[tuple]:
    """Family, folder and a batch for each."""
    found = []
    for name in MODELS:
        family, folder = get_family(name), save_base(name, tmp_path_factory.mktemp(name))
        _, processor = family.load(str(folder))
        item = {"image": Image.effect_noise((96, 96), 90).convert("RGB"), "caption": "a red circle"}
        collate_fn = family.make_collator(processor, prompt=family.facts.default_prompt, max_length=32)
        found.append((family, folder, collate_fn([item])))
    return found


@pytest.mark.parametrize("index", range(len(LAUNCHED)), ids=[describe(setup) for setup in LAUNCHED])
def test_every_supported_combination_trains(bases, index):
    family, folder, batch = bases[index % len(bases)]
    options = make_options(
        **LAUNCHED[index], model_id=str(folder), target_modules=list(family.facts.lora_target_modules)
    )
    torch.manual_seed(0)
    accelerator = make_accelerator(options)
    model, _ = load_trainable(options, family, family.facts, accelerator)
    if options.init_lora_weights == "eva":
        start_from_inputs(model, [batch])
    optimizer = make_optimizer(options, model)
    lr_scheduler = make_lr_scheduler(options, optimizer, 2)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    for last in (False, True):
        with accumulate(accelerator, model, last):
            accelerator.backward(model(**batch).loss / 2)
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    assert math.isfinite(norm) and norm > 0
    for name, p in model.named_parameters():
        changed = not torch.equal(before[name], p)
        assert not (changed and not p.requires_grad), f"{name} is frozen and changed"
        if "lora_B" in name:
            assert changed, f"{name} is dead"
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_page_shows_the_table():
    page = REPOSITORY / "docs" / "memory.md"
    assert make_table() in page.read_text(encoding="utf-8"), (
        "python -m caption_train.config.compatibility prints it"
    )


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.sentence[:40])
def test_a_refusal_says_which_flag_to_change(refusal):
    assert re.findall(r"--[a-z_]+", refusal.sentence)
    assert re.search(r"\b(use|drop|add|launch)\b", refusal.sentence)


def test_adamw_with_flora_accelerator_names_both_flags():
    (problem,) = check(make_options(accumulation_compression=True))
    assert "--accumulation_compression" in problem and "--optimizer_name AdamW" in problem


def test_the_accelerators_own_answers_are_checked():
    assert not check(make_options(device=None, mixed_precision=None))
    assert check(make_options(device=None), device="cpu", precision="fp16")
    assert check(make_options(), distributed="MEGATRON_LM")
    assert not check(make_options(), distributed="FSDP")
    assert check(make_options(auto_batch_size=True), distributed="FSDP")
    bf16 = make_options(train_method="full", dtype="bfloat16")
    assert "float32" in check(bf16, distributed="DEEPSPEED")[0]
    assert not check(bf16, distributed="FSDP")
    assert not check(make_options(), distributed="MULTI_CPU", precision="bf16")


COMPRESSED = {"optimizer_name": "Flora", "accumulation_compression": True}
ON_RANKS = {
    "blip": {"quantize": "8bit", "gradient_checkpointing": True, "optimizer_name": "AdamW8bit"},
    "florence": {"quantize": "4bit", "gradient_checkpointing": True, "dora": True, "lora_plus_ratio": 4.0},
    "moondream": {**COMPRESSED, "activation_checkpointing": True, "train_method": "full"},
}


@pytest.mark.parametrize("name", ON_RANKS)
def test_savers_on_two_processes_equal_those_on_one(name, tmp_path):
    base, pairs = save_base(name, tmp_path / "base"), write_pairs(tmp_path / "pairs", 8)

    def work(output: str, batch_size: int):
        few = {"optimizer_rank": 4, "accumulation_rank": 4, "epochs": 1, "batch_size": batch_size}
        options = make_run_options(name, base, pairs, tmp_path / output, **few, **ON_RANKS[name])
        return lambda: train(name, options)

    children = [*start_ranks(2, work("two", 2), tmp_path / "log"), start(work("one", 4), tmp_path / "log")]
    assert [child.wait() for child in children] == [0, 0, 0], (tmp_path / "log").read_text()[-2000:]
    one, two = (load_file(next((tmp_path / output).glob("*model.safetensors"))) for output in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=3e-4)

"""Parts and targets from config.json, loss from the captions' logits, runs that go on bit for bit."""

import json
import re
import shutil
import sys

import pytest
import torch

from caption_train.adapters.lora import wrap_with_lora
from caption_train.adapters.quantization import make_quantization_config
from caption_train.cli.commands import train_main
from caption_train.config.training import TrainOptions
from caption_train.config.values import PARTS
from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.training.memory.gradient_checkpointing import enable_checkpointing
from caption_train.training.monitor.health import copy_lora_b, find_dead_modules
from caption_train.training.optim.optimizer import group_parameters
from tests.fixtures.forked import start_ranks
from tests.fixtures.runs import assert_same_run, make_options, read_log, train, write_pairs
from tests.fixtures.vlm import KINDS, save_vlm

TYPES = [kind for kind in KINDS if kind not in ("joycaption", "llava_vicuna")]


@pytest.fixture(scope="module")
def family():
    return get_family("vlm")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 10)


@pytest.fixture(scope="module")
def batch_of(family):
    """`batch_of(processor)`: a training batch of two sizes and two lengths of caption."""
    from PIL import Image

    items = [
        {"image": Image.new("RGB", (96, 64), "red"), "caption": "red"},
        {"image": Image.effect_noise((64, 128), 80).convert("RGB"), "caption": "a lot of grey noise"},
    ]
    return lambda processor: family.make_collator(processor, prompt="What?", max_length=50)(items)


@pytest.mark.parametrize("kind", TYPES)
def test_parts_are_known_without_weights_and_every_lora_in_them_is_alive(family, tiny_base, batch_of, kind):
    folder = tiny_base(f"vlm/{kind}")
    facts = family.describe(str(folder))
    model, processor = family.load(str(folder))
    parts = ["vision", "language"] if kind in ("gemma3", "llava_next") else list(PARTS)
    model = wrap_with_lora(
        model,
        facts.lora_target_modules,
        rank=2,
        alpha=4,
        dropout=0,
        parts=[facts.parts[part] for part in parts],
    )
    before = copy_lora_b(model)
    names = [name.removeprefix("base_model.model.") for name in before]
    for part in parts:
        assert any(re.fullmatch(facts.parts[part], name.partition(".lora_B")[0]) for name in names), part
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch_of(processor)).loss.backward()
    optimizer.step()
    assert find_dead_modules(model, before) == []


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "gemma3"])
def test_every_part_of_a_lora_learns_at_its_own_rate(family, tiny_base, kind):
    facts = family.describe(str(tiny_base(f"vlm/{kind}")))
    model, _ = family.load(str(tiny_base(f"vlm/{kind}")))
    parts = [facts.parts[part] for part in PARTS]
    model = wrap_with_lora(model, facts.lora_target_modules, rank=2, alpha=4, dropout=0, parts=parts)
    rates = {"vision": 1e-5, "projector": 1e-4, "language": 1e-3}
    options = TrainOptions(part_learning_rates=[f"{part}={rate}" for part, rate in rates.items()])
    groups = group_parameters(options, model, facts.parts)
    by_parameter = {p: group["lr"] for group in groups for p in group["params"]}
    assert set(by_parameter.values()) == set(rates.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            (part,) = (part for part in PARTS if re.fullmatch(facts.parts[part], layer))
            assert by_parameter[p] == rates[part], name


def test_the_default_is_every_linear_of_the_language_part_and_no_head(family, tiny_base):
    folder = str(tiny_base("vlm/qwen3_5"))
    facts = family.describe(folder)
    model, _ = family.load(folder)
    targets = tuple(f".{target}" for target in facts.lora_target_modules)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(facts.parts["language"], name):
            assert name.endswith(targets) != (name == "lm_head"), name


def test_experts_are_named_and_left_as_they_are(family, tmp_path):
    folder = save_vlm("qwen3_vl", tmp_path, weights=False)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["model_type"] = "qwen3_vl_moe"
    config["text_config"] |= {
        **{"model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "decoder_sparse_step": 1},
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    facts = family.describe(str(folder))
    assert "q_proj" in facts.lora_target_modules and "gate" not in facts.lora_target_modules
    (note,) = facts.notes
    assert "is a mixture of experts" in note and ".mlp.experts" in note


@pytest.mark.parametrize(
    ("kind", "script"),
    [("blip", "blip_network"), ("florence2", "florence_lora"), ("moondream1", "moondream_lora")],
)
def test_models_with_a_script_of_their_own_are_sent_there(family, tmp_path, kind, script):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), "utf-8")
    with pytest.raises(
        UsageError, match=f"has scripts of its own: it is for train_{script}.py and inference"
    ):
        family.load(str(tmp_path))


def test_a_model_that_reads_no_images_is_refused(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    with pytest.raises(UsageError, match="a llama model, not one that transformers knows to read an image"):
        family.load(str(tmp_path))


def test_an_image_processor_that_needs_torchvision_is_named(family, tmp_path):
    if _has_torchvision():
        pytest.skip("torchvision is installed")
    folder = save_vlm("llava", tmp_path, weights=False)
    settings = {"image_processor_type": "Cohere2VisionImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(UsageError, match=r"Cohere2Vision.*has no PIL version: pip install torchvision"):
        family.load(str(folder))


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_of_kept_logits_is_that_of_all(family, tiny_base, batch_of, kind):
    model, processor = family.load(str(tiny_base(f"vlm/{kind}")))
    batch = batch_of(processor)
    assert len(batch["logits_to_keep"]) < batch["input_ids"].shape[1]
    full = {name: value for name, value in batch.items() if name not in ("logits_to_keep", "shift_labels")}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**full).loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_5", "llava", "smolvlm"])
def test_gradient_checkpointing_changes_no_gradient(family, tiny_base, batch_of, kind):
    folder = str(tiny_base(f"vlm/{kind}"))
    facts, found = family.describe(folder), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, processor = family.load(folder)
        parts = [facts.parts["vision"], facts.parts["language"]]
        model = wrap_with_lora(model, facts.lora_target_modules, rank=2, alpha=4, dropout=0, parts=parts)
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        model(**batch_of(processor)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("vision" in name or "visual" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava"])
def test_only_the_parts_asked_for_are_quantized(family, tiny_base, pairs, tmp_path, kind):
    folder = tiny_base(f"vlm/{kind}")
    facts = family.describe(str(folder))
    options = make_options("vlm", folder, pairs, tmp_path, quantize="4bit", quantize_parts=["language"])
    model, _ = family.load(
        str(folder), quantization_config=make_quantization_config(options, "no", facts.parts)
    )
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert any(re.fullmatch(facts.parts["language"], name) for name in packed)
    others = f"{facts.parts['vision']}|{facts.parts['projector']}"
    assert not [name for name in packed if re.fullmatch(others, name)]
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_base, pairs, tmp_path, kind):
    base = tiny_base(f"vlm/{kind}")
    common = {"train_parts": ["language"], "num_workers": 1, "dropout": 0.1}
    common["gradient_accumulation_steps"] = 2
    whole, part = tmp_path / "whole", tmp_path / "part"
    train("vlm", make_options("vlm", base, pairs, whole, epochs=3, **common))
    train("vlm", make_options("vlm", base, pairs, part, epochs=3, save_every_n_steps=1, **common))
    for folder in sorted(part.glob("step-*"))[4:]:
        shutil.rmtree(folder)
    options = make_options("vlm", base, pairs, part, epochs=3, save_every_n_steps=1, resume="auto", **common)
    train("vlm", options)
    assert_same_run(whole, part)


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava"])
def test_two_ranks_learn_what_one_does(tiny_base, pairs, tmp_path, kind):
    base = tiny_base(f"vlm/{kind}")
    flags = [
        "--model_id",
        base,
        "--epochs",
        "2",
        "--learning_rate",
        "1e-3",
        "--dropout",
        "0",
        "--device",
        "cpu",
    ]

    def work() -> None:
        argv = [pairs, tmp_path / "two", *flags, "--batch_size", "2"]
        sys.exit(train_main("vlm", [*map(str, argv)]))

    codes = [rank.wait() for rank in start_ranks(2, work, tmp_path / "log")]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert train_main("vlm", [*map(str, [pairs, tmp_path / "one", *flags, "--batch_size", "4"])]) == 0
    for row, other in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=2e-4)


def test_settings_stand_in_the_adapter_and_are_used(family, tiny_base, pairs, tmp_path, capsys):
    from caption_train.cli.commands import caption_main

    base, out = tiny_base("vlm/qwen3_vl"), tmp_path / "out"
    flags = ["--model_id", base, "--epochs", "1", "--batch_size", "4", "--device", "cpu", "--preset", "tags"]
    flags += ["--system_prompt", "Be brief.", "--max_pixels", "9000"]
    assert train_main("vlm", [*map(str, [pairs, out, *flags])]) == 0
    assert "images: at most 9,000 pixels" in capsys.readouterr().err
    record = json.loads((out / "training.json").read_text("utf-8"))
    assert record["settings"] == {"system_prompt": "Be brief.", "max_pixels": 9000}
    assert record["prompt"].startswith("List tags")
    common = ["--images", pairs, "--peft_model", out, "--device", "cpu", "--max_token_length", "2"]
    assert caption_main("vlm", [*map(str, common), "--num_workers", "0"]) == 0
    said = capsys.readouterr().err
    assert (
        "images: at most 9,000 pixels" in said and 'prompt "List tags' in said and "trained with" not in said
    )
    assert caption_main("vlm", [*map(str, common), "--num_workers", "0", "--max_pixels", "5000"]) == 0
    assert "--max_pixels 5000: the model was trained with 9000" in capsys.readouterr().err


def test_a_model_must_be_named(pairs, tmp_path, capsys):
    assert train_main("vlm", [str(pairs), str(tmp_path / "out")]) == 2
    assert "--model_id is required" in capsys.readouterr().err


def _has_torchvision() -> bool:
    from importlib.util import find_spec

    return find_spec("torchvision") is not None

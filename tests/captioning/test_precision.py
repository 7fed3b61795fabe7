"""`--dtype auto` and `--quantize` when captioning, and what an unfinished run's folder says."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from caption_train.adapters.load import load_adapter
from caption_train.adapters.record import read_adapter, resolve_base
from caption_train.captioning.generate import (
    OutOfMemoryError,
    find_dtype,
    load_captioner,
    out_of_memory_explained,
)
from caption_train.cli.commands import caption_main
from caption_train.config.captioning import CaptionOptions
from caption_train.data.images import open_image
from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.system import devices
from caption_train.system.devices import move_batch
from tests.fixtures.runs import make_options, train, write_pairs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """The folder of a small trained LoRA for BLIP."""
    folder = tmp_path_factory.mktemp("precision")
    data = write_pairs(folder / "images", 2)
    train(
        "blip",
        make_options("blip", tiny_base("blip"), data, folder / "lora", epochs=1, mixed_precision="bf16"),
    )
    return folder / "lora"


@pytest.mark.parametrize(
    ("name", "trained", "has", "found"),
    [
        ("float32", "bf16", True, torch.float32),
        ("float16", "no", True, torch.float16),
        ("auto", "bf16", True, torch.bfloat16),
        ("auto", "bf16", False, torch.float32),
        ("auto", None, True, torch.bfloat16),
        ("auto", "no", True, torch.float32),
        ("auto", "fp16", True, torch.float32),
    ],
)
def test_auto_is_what_the_adapter_was_trained_in_if_the_device_has_it(name, trained, has, found, monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: has)
    assert devices.choose_dtype(name, trained, CPU) == found


def test_the_precision_of_an_adapter_is_read_from_its_record(adapter, monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    assert read_adapter(adapter).mixed_precision == "bf16"
    options = CaptionOptions(images=["a.png"], peft_model=adapter, dtype="auto")
    assert find_dtype(options, CPU) == torch.bfloat16
    given = CaptionOptions(images=["a.png"], quantize="4bit", sources={"dtype": "command line"})
    assert find_dtype(given, CPU) == torch.float32, "--dtype float32 counts where it is given"
    assert find_dtype(CaptionOptions(images=["a.png"], quantize="4bit"), CPU) == torch.bfloat16


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_captions_come_from_a_quantized_base_with_an_adapter(adapter, kind, tmp_path, capsys):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    family, layers = get_family("blip"), {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
    options = CaptionOptions(images=["a.png"], peft_model=adapter, quantize=kind)
    base = resolve_base(family, None, None, None, read_adapter(adapter))
    model, _ = load_captioner(family, base, options, CPU)
    assert any(isinstance(module, getattr(bitsandbytes.nn, layers[kind])) for module in model.modules())

    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "a.png")
    flags = ["--peft_model", str(adapter), "--quantize", kind, "--device", "cpu", "--max_token_length", "4"]
    assert caption_main("blip", [str(tmp_path), *flags, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["file_name"].endswith("a.png")
    assert f"the base in {kind}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["blip", "florence", "moondream"])
def test_an_adapter_is_merged_in_float32_and_answers_with_the_same_tokens(name, overfitted, pairs_folder):
    """In half precision it stays beside the weights: there the sum would be rounded."""
    folder, family = overfitted(name), get_family(name)
    base = resolve_base(family, None, None, None, read_adapter(folder))
    pictures = [open_image(path) for path in sorted(pairs_folder.glob("*.png"))]

    def caption(model, processor):
        batch = family.encode(processor, pictures, [base.prompt] * len(pictures))
        batch = move_batch(batch, CPU, next(model.parameters()).dtype)
        return [g.token_ids for g in family.generate(model, processor, batch, max_new_tokens=12)]

    def load(dtype):
        options = CaptionOptions(images=["a.png"], peft_model=folder, dtype=dtype)
        return load_captioner(family, base, options, CPU)

    merged, processor = load("float32")
    beside = load_adapter(family.load(base.model_id, revision=base.revision)[0], folder, family)
    assert not any("lora_" in name for name, _ in merged.named_modules())
    assert any("lora_" in name for name, _ in load("bfloat16")[0].named_modules())
    tokens = caption(merged, processor)
    assert tokens == caption(beside, processor) and len(set(map(tuple, tokens))) == len(pictures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blip_captions_with_fused_attention_and_the_tokens_of_plain_attention(
    overfitted, pairs_folder, dtype, monkeypatch
):
    folder, family, calls = overfitted("blip"), get_family("blip"), []
    base = resolve_base(family, None, None, None, read_adapter(folder))
    options = CaptionOptions(images=["a.png"], peft_model=folder, dtype=dtype)
    pictures = [open_image(path) for path in sorted(pairs_folder.glob("*.png"))]
    fused = torch.nn.functional.scaled_dot_product_attention

    def count(*tensors, **settings):
        calls.append(tensors[0].shape)
        return fused(*tensors, **settings)

    def caption():
        model, processor = load_captioner(family, base, options, CPU)
        batch = family.encode(processor, pictures, [""] * len(pictures))
        batch = move_batch(batch, CPU, model.dtype)
        with torch.inference_mode():
            features = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
            generated = family.generate(model, processor, batch, max_new_tokens=12)
        return features.float(), [g.token_ids for g in generated]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    features, tokens = caption()
    assert len(calls) == 8 and calls[0][0] == len(pictures), "four layers, twice"
    monkeypatch.setattr(type(family), "speed_up", lambda self, model: None)
    plain, plain_tokens = caption()
    assert len(calls) == 8
    torch.testing.assert_close(features, plain, **({} if dtype == "float32" else {"atol": 0.1, "rtol": 0.05}))
    assert tokens == plain_tokens and len(set(map(tuple, tokens))) == len(pictures)


def test_an_adapter_that_peft_cannot_merge_stays_beside_the_weights(tiny_base, tmp_path):
    """Depthwise convolutions are such layers; what comes before them is merged already."""
    family, folder = get_family("florence"), tmp_path / "lora"
    torch.manual_seed(0)
    targets = ["qkv", "blocks.0.0.spatial_block.conv2"]
    model = get_peft_model(
        family.load(str(tiny_base("florence")))[0], LoraConfig(r=32, target_modules=targets)
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    model.save_pretrained(folder)
    base = resolve_base(family, str(tiny_base("florence")), None, "<CAPTION>", None)
    options = CaptionOptions(images=["a.png"], peft_model=folder)
    loaded, processor = load_captioner(family, base, options, CPU)
    pixels = family.encode(processor, [Image.effect_noise((40, 40), 90).convert("RGB")], ["<CAPTION>"])[
        "pixel_values"
    ]
    with torch.no_grad():
        expected = model.eval().get_base_model().model.vision_tower(pixels).last_hidden_state
        found = loaded.get_base_model().model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_of_one_that_does_not_fit_is_not_told_to_be_smaller(batch_size):
    with pytest.raises(OutOfMemoryError) as raised, out_of_memory_explained(CPU, batch_size):
        raise MemoryError
    advice = str(raised.value).partition(": ")[2]
    assert "lower it" not in advice
    assert ("--batch_size" in advice) == (batch_size > 1) and "--max_token_length" in advice


def test_quantizing_a_served_model_is_refused():
    problems = CaptionOptions(images=["a"], endpoint="http://x", model="m", quantize="4bit").check()
    assert problems == ["--quantize is for models loaded here: drop it, or --endpoint"]


def test_the_folder_of_an_unfinished_run_names_what_can_be_used(adapter, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "last").symlink_to(adapter, target_is_directory=True)
    with pytest.raises(UsageError, match=f"a run that has not finished; take {re.escape(str(run))}/last$"):
        read_adapter(run)
    assert read_adapter(run / "last").family == "blip"
    (run / "best").symlink_to(adapter, target_is_directory=True)
    with pytest.raises(UsageError, match=r"best or .*last$"):
        read_adapter(run)


def test_a_name_that_is_a_file_where_there_are_no_links_leads_to_its_checkpoint(adapter, tmp_path, tiny_base):
    adapter.rename(tmp_path / "step-1")
    (tmp_path / "last").write_text("step-1")
    try:
        assert read_adapter(tmp_path / "last").family == "blip"
        options = CaptionOptions(images=["a.png"], peft_model=tmp_path / "last")
        base = resolve_base(get_family("blip"), None, None, None, read_adapter(tmp_path / "last"))
        assert load_captioner(get_family("blip"), base, options, CPU)[0] is not None
    finally:
        (tmp_path / "step-1").rename(adapter)

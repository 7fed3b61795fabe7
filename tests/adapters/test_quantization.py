"""Quantized bases: what they compute, what is trained on them, and what a merge gives."""

import copy
import re
import weakref

import pytest
import torch
from PIL import Image

from caption_train.adapters import quantization
from caption_train.adapters.lora import wrap_with_lora
from caption_train.adapters.quantization import HEADS, make_quantization_config, prepare_quantized
from caption_train.config.training import TrainOptions
from caption_train.families import get_family
from tests.fixtures.runs import MODELS, save_base


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return get_family(request.param)


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_base(family.name, tmp_path_factory.mktemp(family.name))


def load(family, folder, **flags):
    options = TrainOptions(**flags)
    model, processor = family.load(
        str(folder), quantization_config=make_quantization_config(options, parts=family.facts.parts)
    )
    return prepare_quantized(model), processor


def make_batch(family, processor) -> dict:
    images = [Image.effect_noise((96, 96), 90).convert("RGB") for _ in range(2)]
    items = [{"image": image, "caption": "a red circle above a green square"} for image in images]
    return family.make_collator(processor, prompt=family.facts.default_prompt, max_length=32)(items)


def add_lora(model, family):
    torch.manual_seed(0)
    model = wrap_with_lora(model, family.facts.lora_target_modules, rank=4, alpha=8, dropout=0.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


def dequantize(model, family, folder):
    """Return a plain model with the weights that the quantized one computes with."""
    plain, _ = family.load(str(folder))
    modules = dict(plain.named_modules())
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            modules[name].weight.data.copy_(weight)
    return plain


def step(model, batch) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_compute_dtype_follows_the_mixed_precision():
    def dtype(resolved=None, **flags):
        config = make_quantization_config(TrainOptions(quantize="4bit", **flags), resolved)
        return config.bnb_4bit_compute_dtype

    assert dtype() == torch.float32
    assert dtype(mixed_precision="bf16") == torch.bfloat16
    assert dtype("fp16") == torch.float16
    assert make_quantization_config(TrainOptions()) is None


def test_without_mixed_precision_a_gpu_that_has_bfloat16_computes_in_it(monkeypatch):
    monkeypatch.setattr(quantization, "has_bfloat16", lambda device: True)

    def dtype(device, resolved="no"):
        options = TrainOptions(quantize="4bit")
        return make_quantization_config(options, resolved, device=torch.device(device)).bnb_4bit_compute_dtype

    assert dtype("cuda") == torch.bfloat16 and dtype("cpu") == torch.float32
    assert dtype("cuda", "fp16") == torch.float16


def test_every_targeted_linear_is_held_in_nf4(family, folder):
    model, _ = load(family, folder, quantize="4bit")
    from bitsandbytes.nn import Linear4bit

    linears = [m for m in model.modules() if isinstance(m, Linear4bit)]
    quantized = sum(_held_bytes(m.weight) for m in linears)
    full = sum(4 * m.weight.quant_state.shape.numel() for m in linears)
    assert quantized <= 0.14 * full
    targets = tuple(family.facts.lora_target_modules)
    missed = [
        name for name, m in model.named_modules() if type(m) is torch.nn.Linear and name.endswith(targets)
    ]
    assert not missed
    heads = [m for name, m in model.named_modules() if name.endswith(HEADS)]
    assert heads and all(type(m) is torch.nn.Linear for m in heads)
    assert not any(p.requires_grad for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms and all(m.weight.dtype == torch.float32 for m in norms)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_part_can_stay_in_full_precision(family, folder, quantize):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model, _ = load(family, folder, quantize=quantize, quantize_parts=["language", "projector"])
    kinds = {
        name: isinstance(module, (Linear4bit, Linear8bitLt))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name, is_quantized in kinds.items():
        in_vision = re.fullmatch(family.facts.parts["vision"], name) is not None
        assert is_quantized == (not in_vision and not name.endswith(HEADS)), name


def test_training_equals_training_on_the_dequantized_base(family, folder):
    quantized, processor = load(family, folder, quantize="4bit")
    plain = add_lora(dequantize(quantized, family, folder), family)
    quantized, batch = add_lora(quantized, family), make_batch(family, processor)
    loss, gradients = step(quantized, batch)
    expected, expected_gradients = step(plain, batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_an_evaluation_in_between_changes_no_weight(family, folder, quantize):
    model, processor = load(family, folder, quantize=quantize)
    model, batch = add_lora(model, family), make_batch(family, processor)
    weights = {n: p.data.clone() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    before = step(model.train(), batch)
    with torch.no_grad():
        model.eval()(**batch)
        prompts = family.encode(processor, [Image.new("RGB", (96, 96))], [family.facts.default_prompt])
        family.generate(model, processor, prompts, max_new_tokens=4)
    torch.manual_seed(1)
    after = step(model.train(), batch)
    assert after[0] == before[0]
    assert all(torch.equal(weights[n], p.data) for n, p in model.named_parameters())


def test_an_adapter_trained_on_a_quantized_base_merges_into_the_dequantized_one(family, folder, tmp_path):
    from peft import PeftModel

    quantized, processor = load(family, folder, quantize="4bit")
    plain = dequantize(quantized, family, folder)
    quantized, batch = add_lora(quantized, family), make_batch(family, processor)
    quantized.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        expected = quantized(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-4)
        merged = copy.deepcopy(loaded).merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantized_linear_keeps_no_input_for_its_frozen_weight(family, folder, quantize):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model, _ = load(family, folder, quantize=quantize)
    linear = next(m for m in model.train().modules() if isinstance(m, (Linear4bit, Linear8bitLt)))
    x = torch.randn(4, linear.in_features, requires_grad=True)
    scaled = x * 2
    kept = weakref.ref(scaled)
    output = linear(scaled)
    del scaled
    assert kept() is None
    output.sum().backward()
    assert x.grad.abs().sum() > 0


def test_eight_bits_train(family, folder):
    model, processor = load(family, folder, quantize="8bit")
    model, batch = add_lora(model, family), make_batch(family, processor)
    plain = add_lora(family.load(str(folder))[0], family)
    loss, gradients = step(model, batch)
    assert loss == pytest.approx(step(plain, batch)[0], rel=0.02)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def _held_bytes(weight) -> int:
    state = weight.quant_state
    constants = [state.absmax, state.state2.absmax]
    return sum(t.numel() * t.element_size() for t in [weight.data, *constants])

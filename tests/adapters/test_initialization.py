"""LoRAs that start from the base's weights or the data: what they are, and that others can use them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from caption_train.adapters.initialization import (
    find_principal,
    resume_start,
    start_from_inputs,
    start_from_weights,
)
from caption_train.adapters.load import load_adapter
from caption_train.adapters.lora import save_adapter, wrap_with_lora
from caption_train.errors import UsageError
from caption_train.families import get_family
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.runs import assert_same_run, make_options, save_base, train, write_pairs

CPU = torch.device("cpu")
PRINCIPAL = ("pissa", "pissa_niter_16", "olora")


class Model(nn.Module):
    """A Conv2d before two Linears, one wide and one tall."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2)
        self.wide = nn.Linear(6, 5)
        self.tall = nn.Linear(5, 8)

    def forward(self, x):
        return self.tall(torch.tanh(self.wide(torch.tanh(self.conv(x)).flatten(2).transpose(1, 2))))


def make_model():
    torch.manual_seed(0)
    return Model()


def make_input(seed=1):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def wrap(init, dtype=torch.float32, **settings):
    model = wrap_with_lora(
        make_model().to(dtype), ["conv", "wide", "tall"], rank=3, alpha=4, dropout=0.0, **settings
    )
    if init in PRINCIPAL:
        start_from_weights(model, init, CPU)
    return model


def take_steps(model, count=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for seed in range(count):
        model(make_input(seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}])
def test_a_start_from_the_weights_changes_no_output(init, settings):
    model, x = wrap(init, **settings), make_input()
    torch.testing.assert_close(model(x), make_model()(x))
    base = make_model()
    assert not torch.allclose(model.base_model.model.wide.base_layer.weight, base.wide.weight)
    assert torch.equal(model.base_model.model.conv.base_layer.weight, base.conv.weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_the_one_of_peft(init, rslora):
    config = LoraConfig(
        r=3, lora_alpha=4, target_modules=["wide", "tall"], init_lora_weights=init, use_rslora=rslora
    )
    theirs = get_peft_model(make_model(), config).state_dict()
    ours = wrap(init, rslora=rslora).state_dict()
    for name in (name for name in theirs if "lora_" in name or "base_layer" in name):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_pissa_is_the_best_approximation_of_its_rank():
    weight = torch.randn(20, 12)
    singular = torch.linalg.svdvals(weight)
    for init in ("pissa", "pissa_niter_16"):
        a, b = find_principal(weight, 4, init)
        assert torch.linalg.norm(weight - b @ a) == pytest.approx(singular[4:].norm().item(), rel=1e-3)


@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}])
def test_what_is_saved_fits_the_untouched_base_in_plain_peft(init, settings, tmp_path):
    model, x = wrap(init, **settings), make_input()
    take_steps(model)
    expected = model.eval()(x)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 6
    plain = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)
    ours = load_adapter(make_model(), tmp_path, family=FakeFamily())
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", PRINCIPAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_base_is_the_same_to_the_bit(init, dtype, tmp_path):
    model = wrap(init, dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    save_adapter(model, tmp_path)
    again = wrap(None, dtype)
    trained = resume_start(again, load_file(tmp_path / "adapter_model.safetensors"), init, CPU)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(trained[name.replace(".default", "")], p), name
        else:
            assert torch.equal(again.get_parameter(name), p), name
    assert again.lora_start.keys() == model.lora_start.keys()
    assert all(torch.equal(again.lora_start[name], start) for name, start in model.lora_start.items())


def test_a_rank_that_a_weight_does_not_have_is_refused_by_name():
    model = wrap_with_lora(make_model(), ["wide", "tall"], rank=6, alpha=4, dropout=0.0)
    with pytest.raises(UsageError, match=r"--rank 6 is more than wide has.* 5 × 6; use --rank 5"):
        start_from_weights(model, "pissa", CPU)


def test_a_weight_that_is_used_elsewhere_is_refused_by_name():
    base = make_model()
    base.again = nn.Linear(6, 5)
    base.again.weight = base.wide.weight
    model = wrap_with_lora(base, ["wide"], rank=3, alpha=4, dropout=0.0)
    with pytest.raises(UsageError, match=r"wide shares its weight .* --target_modules"):
        start_from_weights(model, "olora", CPU)


def test_eva_starts_with_the_directions_of_the_inputs():
    model = wrap(None)
    batches = [{"x": make_input(seed)} for seed in range(6)]
    before, seen = model.base_model.model.conv.lora_A["default"].weight.clone(), []
    model.base_model.model.wide.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    start_from_inputs(model, batches)
    inputs = torch.cat([x.reshape(-1, 6) for x in seen]).detach()
    a = model.base_model.model.wide.lora_A["default"].weight.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=0, atol=1e-5)
    _, s, vh = torch.linalg.svd(inputs, full_matrices=False)
    kept = (inputs @ a.T).square().sum().item()
    assert kept == pytest.approx(s[:3].square().sum().item(), rel=0.02)
    assert abs((a[0] @ vh[0]).item()) == pytest.approx(1, abs=0.02)
    assert torch.equal(model.base_model.model.conv.lora_A["default"].weight, before)
    torch.testing.assert_close(model(make_input()), make_model()(make_input()))


def test_inputs_of_fewer_directions_than_the_rank_leave_the_rest_of_a_as_it_is():
    model = wrap(None)
    before = model.base_model.model.wide.lora_A["default"].weight.clone()
    with torch.no_grad():
        model.base_model.model.conv.base_layer.weight.zero_()
    start_from_inputs(model, [{"x": make_input(seed)} for seed in range(3)])
    after = model.base_model.model.wide.lora_A["default"].weight
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1:], before[1:])
    assert torch.isfinite(after).all()


@pytest.fixture(scope="module", params=["blip", "florence"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base, pairs = save_base(request.param, folder / "base"), write_pairs(folder / "pairs", 8)
    return lambda output, **changes: (
        request.param,
        make_options(request.param, base, pairs, output, **changes),
    )


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "eva"])
def test_a_run_is_resumed_exactly_and_leaves_adapters_for_the_base(run, init, tmp_path):
    settings = {"init_lora_weights": init, "save_every_n_epochs": 1, "epochs": 2}
    name, options = run(tmp_path / "whole", **settings)
    train(name, options)
    copied = tmp_path / "cut"
    (first,) = (tmp_path / "whole").glob("epoch-0001-*")
    copied.mkdir()
    shutil.copytree(first, copied / first.name)
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines(keepends=True)
    (copied / "log.jsonl").write_text("".join(log[: len(log) // 2]))
    train(name, run(copied, **settings, resume="auto")[1])
    assert_same_run(tmp_path / "whole", copied)
    family = get_family(name)
    for folder in (first, tmp_path / "whole"):
        load_adapter(family.load(options.model_id)[0], folder, family)

"""The LoRA around a model of three layers: what is trained, what is dead, what fits."""

import json

import pytest
import torch
from torch import nn

from caption_train.adapters.load import fill_adapter, load_adapter
from caption_train.adapters.lora import count_parameters, save_adapter, wrap_with_lora
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.training.monitor.health import copy_lora_b, find_dead_modules
from tests.fixtures.fake_family import FakeFamily


class Model(nn.Module):
    """`unused` is never called; `conv`, `block.0` and `block.1` are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.block = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
        self.unused = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        hidden = self.norm(self.conv(x).mean((2, 3)))
        for layer in self.block:
            hidden = layer(hidden)
        return hidden


def wrap(*targets, **settings):
    torch.manual_seed(0)
    return wrap_with_lora(Model(), targets, **{"rank": 2, "alpha": 4, "dropout": 0.0, **settings})


def take_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()


def test_a_new_lora_changes_nothing():
    torch.manual_seed(0)
    plain, image = Model(), torch.ones(1, 3, 4, 4)
    expected = plain(image)
    model = wrap("conv", "0", "1")
    torch.testing.assert_close(model.eval()(image), expected)


def test_only_lora_weights_are_trained_and_counted():
    model = wrap("conv", "block.1")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    # conv: 2×3×2×2 + 4×2, block.1: 2×4 + 2×2.
    assert count_parameters(model) == (24 + 8 + 8 + 4, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(("settings", "scale"), [({}, 2.0), ({"rslora": True}, 4 / 2**0.5)])
def test_alpha_scales_by_the_rank_or_its_root(settings, scale):
    layer = wrap("block.1", **settings).base_model.model.block[1]
    assert layer.scaling["default"] == pytest.approx(scale)


def test_parts_limit_what_is_trained():
    trained = {
        name for name, p in wrap("conv", "1", parts=[r"block\..*"]).named_parameters() if p.requires_grad
    }
    assert trained and all("block.1" in name for name in trained)


@pytest.mark.parametrize(
    ("target", "hint"), [("blok.1", "did you mean block.1"), ("zzz", "there are conv, unused"), ("norm", "")]
)
def test_a_target_that_matches_nothing_is_refused(target, hint):
    with pytest.raises(UsageError, match=rf"--target_modules {target}: .*{hint}") as caught:
        wrap("conv", target)
    assert "\n" not in str(caught.value)


def test_a_module_without_a_gradient_is_found_dead_by_name():
    model = wrap("conv", "0", "unused")
    before = copy_lora_b(model)
    take_step(model)
    assert len(before) == 3
    assert find_dead_modules(model, before) == ["unused"]


def saved(tmp_path, model):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def test_a_saved_adapter_loads_onto_its_base_with_the_same_outputs(tmp_path):
    model, image = wrap("conv", "0", "1"), torch.ones(1, 3, 4, 4)
    take_step(model)
    expected = model.eval()(image)
    torch.manual_seed(0)
    loaded = load_adapter(Model(), saved(tmp_path, model), family=FakeFamily())
    assert torch.equal(loaded(image), expected)
    torch.testing.assert_close(loaded.merge_and_unload()(image), expected)


def test_an_adapter_with_a_tensor_over_or_missing_is_refused(tmp_path):
    model = wrap("conv", "0")
    weights = {
        name.replace(".default", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    name = sorted(weights)[0]
    for wrong in (
        {key: value for key, value in weights.items() if key != name},
        weights | {"base_model.model.elsewhere.lora_A.weight": torch.zeros(2, 4)},
        weights | {name: torch.zeros(1, 1)},
    ):
        with pytest.raises(CaptionTrainError, match="does not fit this base"):
            fill_adapter(model, wrong, tmp_path)
    fill_adapter(model, weights, tmp_path)


def test_a_damaged_adapter_is_one_line(tmp_path):
    folder = saved(tmp_path, wrap("conv"))
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CaptionTrainError, match="--peft_model") as caught:
        load_adapter(Model(), folder, family=FakeFamily())
    assert "\n" not in str(caught.value)


def test_equal_runs_save_equal_configurations(tmp_path):
    names = [f"layer{number}" for number in range(40)]
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    wrapped = wrap_with_lora(model, names, rank=1, alpha=1, dropout=0.0)
    save_adapter(wrapped, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # A set of texts is in another order in every process.
    assert config["target_modules"] == sorted(names)

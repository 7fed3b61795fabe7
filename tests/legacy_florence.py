"""Legacy Florence-2 folders for tests: the shared fixtures, and variations of them written anew."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "florence_legacy"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"{FIXTURES} is not there")

TIED = [
    "language_model.model.shared.weight",
    "language_model.model.encoder.embed_tokens.weight",
    "language_model.model.decoder.embed_tokens.weight",
    "language_model.lm_head.weight",
]


ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "X", "parent_library": "transformers_modules.x"},
    "base_model_name_or_path": "microsoft/Florence-2-base-ft",
    "bias": "none",
    "lora_dropout": 0.05,
    "lora_alpha": 6,
    "r": 4,
    "target_modules": ["anything", "Conv2d"],
    "modules_to_save": None,
    "layers_pattern": None,
    "use_rslora": False,
    "a_field_of_another_peft": 3,
}


def read_tensors() -> dict[str, torch.Tensor]:
    """The tensors of the base layout, each with storage of its own."""
    path = FIXTURES / "checkpoint" / "pytorch_model.bin"
    return {name: tensor.clone() for name, tensor in torch.load(path, weights_only=True).items()}


def read_config(layout: str = "checkpoint") -> dict:
    return json.loads((FIXTURES / layout / "config.json").read_text())


def write_checkpoint(
    folder: Path, tensors: dict, *, config: dict | None = None, layout: str = "bin", shards: int = 1
) -> Path:
    """Write a legacy folder: `tensors` in `shards` files, and the fixture's config and tokenizer."""
    base = FIXTURES / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.name not in ("pytorch_model.bin", "config.json"):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config or read_config()))
    stem, suffix = ("pytorch_model", ".bin") if layout == "bin" else ("model", ".safetensors")
    write = torch.save if layout == "bin" else save_file
    names = sorted(tensors)
    if shards == 1:
        write({name: tensors[name] for name in names}, folder / f"{stem}{suffix}")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}{suffix}"
        write({name: tensors[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shrink_images(folder: Path, side: int = 192) -> Path:
    """Let a legacy folder make small images, so that a model is quick."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    size = {"height": side, "width": side}
    path.write_text(json.dumps(settings | {"size": size, "crop_size": size, "image_seq_length": 37}))
    return folder


def read_golden() -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((FIXTURES / "golden.json").read_text()), load_file(FIXTURES / "golden.safetensors")


def set_size(processor, side: int, image_tokens: int) -> None:
    """Let the processor make square images of `side` pixels."""
    processor.image_processor.size = {"height": side, "width": side}
    processor.num_image_tokens = image_tokens


class LegacyLora:
    """An adapter made by hand, and what it makes of a legacy checkpoint's tensors."""

    def __init__(self, tensors, pattern, *, seed=0, rank=lambda module: 4, dora=False, **config):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name.removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if re.fullmatch(pattern, name.removesuffix(".weight"))
        }
        assert weights
        self.config = ADAPTER_CONFIG | {"use_dora": dora} | config
        self.tensors, self.merged = {}, {}
        for module, weight in weights.items():
            r = rank(module)
            a = torch.randn(r, *weight.shape[1:], generator=generator) * 0.1
            b = torch.randn(len(weight), r, *[1] * (weight.ndim - 2), generator=generator) * 0.1
            alphas = self.config.get("alpha_pattern") or {}
            alpha = next(
                (alphas[key] for key in alphas if re.fullmatch(rf"(.*\.)?{key}", module)),
                self.config["lora_alpha"],
            )
            scale = alpha / (r**0.5 if self.config["use_rslora"] else r)
            merged = weight + scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
            self.tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            if dora:
                magnitude = weight.flatten(1).norm(dim=1) * 1.1
                shape = (1, -1, 1, 1) if weight.ndim == 4 else (-1,)
                self.tensors[f"{module}.lora_magnitude_vector"] = magnitude.view(shape)
                merged = merged * (magnitude / merged.flatten(1).norm(dim=1)).view(
                    -1, *[1] * (weight.ndim - 1)
                )
            self.merged[f"{module}.weight"] = merged

    def write(self, folder, suffix="safetensors"):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        named = {f"base_model.model.{name}": tensor for name, tensor in self.tensors.items()}
        write = torch.save if suffix == "bin" else save_file
        write(named, folder / f"adapter_model.{suffix}")
        return folder

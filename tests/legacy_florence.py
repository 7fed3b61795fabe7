"""Legacy Florence-2 folders for tests: the shared fixtures, and variations of them written anew."""

import json
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

"""Reads and writes checkpoints of the official code: config and weights, in both of its layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.loading import shorten
from caption_train.families.moondream.config import (
    REGION_2B,
    MoondreamConfig,
    find_release,
    legacy_dict,
    native_dict,
)
from caption_train.families.moondream.files import find_folder, find_weight_files, read_weights
from caption_train.families.moondream.legacy.names import (
    legacy_names,
    name_of_2024,
    to_legacy,
    to_names_of_2024,
    to_native,
    transpose_features,
)
from caption_train.families.moondream.releases import RELEASES, REVISIONS
from caption_train.families.weight_files import read_object
from caption_train.system.files import write_atomically

_NOT_WEIGHTS = re.compile(r"kv_cache|attn_mask|freqs_cis|inv_freq")
"""Buffers that the official training script saves with the weights."""

_DIMENSIONS = {
    "text": {
        "dim": ("text.wte", 1),
        "vocab_size": ("text.wte", 0),
        "ff_dim": ("text.blocks.0.mlp.fc1.weight", 0),
    },
    "vision": {
        "enc_dim": ("vision.pos_emb", 2),
        "enc_ff_dim": ("vision.blocks.0.mlp.fc1.weight", 0),
        "proj_inner_dim": ("vision.proj_mlp.fc1.weight", 0),
    },
    "region": {
        "dim": ("region.coord_encoder.weight", 0),
        "coord_feat_dim": ("region.coord_encoder.weight", 1),
        "coord_out_dim": ("region.coord_decoder.fc2.weight", 0),
        "size_feat_dim": ("region.size_encoder.weight", 1),
        "size_out_dim": ("region.size_decoder.fc2.weight", 0),
        "inner_dim": ("region.coord_decoder.fc1.weight", 0),
    },
}
"""Field of the nested config → (tensor, axis) whose size it is."""

_QKV = "text.blocks.0.attn.qkv.weight"


def read_legacy(
    model_id: str | Path | None, *, revision: str | None = None, **kwargs: Any
) -> tuple[MoondreamConfig, dict[str, torch.Tensor]] | None:
    """Read config and weights of an official checkpoint.

    Args:
        model_id: a folder, or a model on the hub.
        revision: branch, tag or commit on the hub. For a folder, the release that its weights are from, if
            its config.json does not say.
        kwargs: `cache_dir`, `token` and `local_files_only` are passed to the download.

    Returns:
        Config and native state dict; None if this is no official checkpoint.

    Raises:
        CaptionTrainError: names each tensor that is missing, left over or of another shape.
        UsageError: nothing says which release this is.
    """
    folder = model_id and find_folder(model_id, revision, **kwargs)
    raw = read_weights(find_weight_files(folder)) if folder else {}
    names = _new_names(list(raw))
    if names is None:
        return None
    tensors = {new: raw[name] for new, name in names.items()}
    if old := any(name.startswith("text_model.") for name in raw):
        tensors = transpose_features(tensors)
    legacy = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    _check_release(model_id, revision, legacy)
    try:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        config = _describe(legacy, shapes, old, revision)
        return config, to_native(tensors, config)
    except CaptionTrainError as error:
        raise CaptionTrainError(f"--model_id {model_id}: {error}") from error


def write_legacy(
    folder: Path | str, config: MoondreamConfig, state: dict[str, torch.Tensor], tokenizer: Any = None
) -> None:
    """Write config.json, model.safetensors and tokenizer.json as this release's official code reads them.

    Tensors are only fused and renamed, so every bit is kept. A model of 2024 is written in the layout of
    2024, because in the newer layout nothing would say how it cuts its images.

    Args:
        folder: the folder to write to.
        config: the model's config.
        state: the state dict of the native model, with adapters merged.
        tokenizer: the model's tokenizer; without one, no tokenizer.json is written.
    """
    folder, dtype = Path(folder), state["lm_head.weight"].dtype
    if not all(tensor.is_floating_point() for tensor in state.values()):
        raise CaptionTrainError(
            "the official layout has no quantized weights: load the base without --quantize"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    tensors = to_legacy(state, config)
    if config.crops == "fixed":
        tensors = to_names_of_2024(tensors)
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(legacy_dict(config, dtype), indent=2) + "\n")
    if tokenizer is not None:
        write_atomically(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True))


def _new_names(names: list[str]) -> dict[str, str] | None:
    """Return new-layout name, without `model.`, → name in the file; None if the layout is neither one."""
    weights = {n.replace("._orig_mod", ""): n for n in names if not _NOT_WEIGHTS.search(n)}
    plain = {short.removeprefix("model."): n for short, n in weights.items()}
    if any(name.startswith(("text.", "vision.")) for name in plain):
        return plain
    if not any(name.startswith(("text_model.", "vision_encoder.")) for name in weights):
        return None
    layers = _count_layers(weights, r"(?:\.blocks|\.h)")
    every = legacy_names(MoondreamConfig(**_layer_counts(layers)))
    of_2024 = {name_of_2024(name): name for name in every}
    return {of_2024.get(short, short): n for short, n in weights.items()}


def _count_layers(names: Any, stack: str) -> int:
    return 1 + max((int(m[1]) for name in names if (m := re.search(rf"{stack}\.(\d+)\.", name))), default=0)


def _layer_counts(layers: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers}
    return {"text_config": sizes, "vision_config": sizes, "region": REGION_2B}


def _check_release(model_id: str | Path, revision: str | None, legacy: dict[str, Any]) -> None:
    """Refuse a revision that is no release, if config.json does not say what depends on the release."""
    if Path(model_id).is_dir():
        if revision not in (None, *REVISIONS):
            raise UsageError(f"--revision {revision}: the releases of Moondream 2 are {', '.join(RELEASES)}")
        return
    names_tokens = "bos_id" in ((legacy.get("config") or {}).get("tokenizer") or {})
    if revision not in (None, "main", *REVISIONS) and not names_tokens:
        raise UsageError(
            f"--revision {revision}: nothing in {model_id} says whose prompts and tokenizer these weights "
            f"want. Name a release ({', '.join(RELEASES)}), or download it and give the "
            "folder with --revision RELEASE"
        )


def _describe(
    legacy: dict[str, Any], shapes: dict[str, list[int]], old: bool, revision: str | None
) -> MoondreamConfig:
    """Return the config: from config.json first, then the shapes of the weights, then the release."""
    nested = {
        part: dict((legacy.get("config") or {}).get(part) or {}) for part in (*_DIMENSIONS, "tokenizer")
    }
    telling = {name for part in ("text", "vision") for name, _ in _DIMENSIONS[part].values()} | {_QKV}
    if missing := sorted(telling - shapes.keys()):
        raise CaptionTrainError(f"{len(missing)} tensors are not in the checkpoint: {shorten(missing)}")
    for part, dimensions in _DIMENSIONS.items():
        for key, (name, axis) in dimensions.items():
            if name in shapes:
                _set_or_check(nested[part], f"{part}.{key}", key, shapes[name][axis])
    text = nested["text"]
    heads = text.setdefault("n_heads", text["dim"] // 64)
    _set_or_check(text, "text.n_kv_heads", "n_kv_heads", (shapes[_QKV][0] // 64 - heads) // 2)
    for part, key in (("text", "n_layers"), ("vision", "enc_n_layers")):
        _set_or_check(nested[part], f"{part}.{key}", key, _count_layers(shapes, rf"^{part}\.blocks"))
    if "enc_n_heads" not in nested["vision"] and nested["vision"]["enc_dim"] % 72:
        raise CaptionTrainError(
            f"config.json does not give vision.enc_n_heads, and {nested['vision']['enc_dim']} is no multiple "
            "of the released models' 72"
        )
    if old and "HfMoondream" not in (legacy.get("architectures") or ()):
        legacy = {**legacy, "architectures": ["Moondream"]}
    fields = native_dict({**legacy, "config": nested}, find_release(legacy, revision))
    if not any(name.startswith("region.") for name in shapes):
        fields["region"] = None
    return MoondreamConfig(**fields)


def _set_or_check(nested: dict[str, Any], label: str, key: str, seen: int) -> None:
    stated = nested.get(key)
    if stated is not None and stated != seen:
        raise CaptionTrainError(f"config.json says {label} = {stated}, the weights have {seen}")
    nested[key] = seen

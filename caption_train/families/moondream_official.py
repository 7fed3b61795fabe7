"""Reading and writing folders of the official code: config, weights, tokenizer, on the hub or on disk."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.moondream_checkpoint import official_names, old_name, to_native, to_official
from caption_train.families.moondream_config import REGION_2B, MoondreamConfig, native_dict, official_dict
from caption_train.families.moondream_revisions import DEFAULT_REVISION, REVISIONS, TOKENIZER_NAMES
from caption_train.files import write_atomically

END_OF_TEXT = "<|endoftext|>"
STARMIE = ("moondream/starmie-v1", "35192e10a54e36eabe0a7cc57a2c1aab371cafc5")
"""The tokenizer of 2025-06-21: the model's own repository still holds the older one."""

_NOT_WEIGHTS = re.compile(r"kv_cache|attn_mask|freqs_cis|inv_freq")
"""Buffers that the official training script saves among the weights."""

_RELEASES = ", ".join(name for name in REVISIONS if len(name) == len("2025-06-21"))
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
"""Where each dimension of the nested config shows in the weights."""


def read_official(
    model_id: str | Path | None, *, revision: str | None = None, **kwargs: Any
) -> tuple[MoondreamConfig, dict[str, torch.Tensor]] | None:
    """Return config and state dict of an official checkpoint, None if `model_id` is none (or is ours).

    revision: branch, tag or commit on the hub; for a folder, which release its weights are, where its
    config.json does not say. Raises CaptionTrainError naming each tensor that is missing, left over or
    misshapen.
    """
    folder = model_id and find_folder(model_id, revision, **kwargs)
    files = find_weight_files(folder) if folder else []
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        raw = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        names = _new_names(list(raw))
        if names is None:
            return None
        if Path(model_id).is_dir() and revision not in (None, *REVISIONS):
            raise UsageError(f"--revision {revision}: the releases of Moondream 2 are {_RELEASES}")
        shapes = {new: raw[name].get_slice(name).get_shape() for new, name in names.items()}
        config = _describe(folder, shapes, "text_model.lm_head.ln.weight" in raw, revision)
        tensors = {new: raw[name].get_tensor(name) for new, name in names.items()}
    for head in ("region.coord_features", "region.size_features"):
        if head in names and names[head].startswith("region_model."):
            tensors[head] = tensors[head].T.contiguous()
    return config, to_native(tensors, config)


def find_folder(model_id: str | Path, revision: str | None, **kwargs: Any) -> Path | None:
    """Return the folder of a checkpoint, downloaded if it is on the hub; None if there is no such folder."""
    if Path(model_id).is_dir():
        return Path(model_id)
    from huggingface_hub import snapshot_download

    asked = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
    patterns = ["*.json", "*.safetensors"]
    return Path(snapshot_download(str(model_id), revision=revision, allow_patterns=patterns, **asked))


def find_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a folder: one file, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    return [file for file in [folder / "model.safetensors"] if file.is_file()]


def write_official(
    folder: Path | str, config: MoondreamConfig, state: dict[str, torch.Tensor], tokenizer: Any = None
) -> None:
    """Write config.json, model.safetensors and tokenizer.json as the official code reads them.

    state: of our model, with adapters merged. Every tensor keeps its bits, only fused and renamed.
    """
    folder, dtype = Path(folder), state["lm_head.weight"].dtype
    if not all(tensor.is_floating_point() for tensor in state.values()):
        raise CaptionTrainError(
            "the official layout has no quantized weights: load the base without --quantize"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    save_file(to_official(state, config), temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(official_dict(config, dtype), indent=2) + "\n")
    if tokenizer is not None:
        write_atomically(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True))


def find_dtype(model_id: str, revision: str | None = None) -> torch.dtype:
    """Return the precision that a checkpoint's weights are stored in."""
    folder = find_folder(model_id, revision)
    for file in find_weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(next(iter(opened.keys()))).dtype
    raise CaptionTrainError(f"--model_id {model_id}: there is no model.safetensors in it")


def read_tokenizer(model_id: str | Path, revision: str | None, bos_token_id: int, **kwargs: Any) -> Any:
    """Return the tokenizer of an official checkpoint whose sequences begin with `bos_token_id`.

    Raises UsageError naming both tokenizers when the folder holds the other one: the text would be garbage.
    """
    from transformers import PreTrainedTokenizerFast

    if Path(model_id).is_dir():
        file = Path(model_id) / "tokenizer.json"
    else:
        from huggingface_hub import hf_hub_download

        source = STARMIE if TOKENIZER_NAMES.get(bos_token_id) == STARMIE[0] else (str(model_id), revision)
        file = Path(hf_hub_download(source[0], "tokenizer.json", revision=source[1]))
    if not file.is_file():
        raise UsageError(f"--model_id {model_id}: there is no tokenizer.json in it")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    found = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    if found != bos_token_id:
        raise UsageError(
            f"--model_id {model_id}: its tokenizer.json is {_tokenizer_name(found)}, but its weights were "
            f"trained with {_tokenizer_name(bos_token_id)}: put that tokenizer.json there, or name the "
            f"release of the weights with --revision ({_RELEASES})"
        )
    return tokenizer


def _tokenizer_name(bos_token_id: int | None) -> str:
    return f"{TOKENIZER_NAMES.get(bos_token_id, 'another')} ({END_OF_TEXT} = {bos_token_id})"


def _new_names(names: list[str]) -> dict[str, str] | None:
    """Return new-layout names, without `model.`, → names in the file; None if the layout is neither."""
    weights = {n.replace("._orig_mod", ""): n for n in names if not _NOT_WEIGHTS.search(n)}
    plain = {short.removeprefix("model."): n for short, n in weights.items()}
    if "text.wte" in plain:
        return plain
    if "text_model.lm_head.ln.weight" not in weights:
        return None
    blocks = [int(m[1]) for n in weights if (m := re.search(r"(?:\.blocks|\.h)\.(\d+)\.", n))]
    every = official_names(MoondreamConfig(**_layer_counts(max(blocks) + 1)))
    olds = {old_name(new): new for new in every}
    return {olds.get(short, short): n for short, n in weights.items()}


def _layer_counts(layers: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers}
    return {"text_config": sizes, "vision_config": sizes, "region": REGION_2B}


def _describe(folder: Path, shapes: dict[str, list[int]], old: bool, revision: str | None) -> MoondreamConfig:
    """Return the config: config.json's word first, then the weights' shapes, then the revision's facts."""
    official = _read_json(folder / "config.json")
    nested = {
        part: dict((official.get("config") or {}).get(part) or {}) for part in (*_DIMENSIONS, "tokenizer")
    }
    for part, dimensions in _DIMENSIONS.items():
        for key, (name, axis) in dimensions.items():
            if name in shapes:
                _settle(folder, nested[part], f"{part}.{key}", key, shapes[name][axis])
    text = nested["text"]
    heads = text.setdefault("n_heads", text["dim"] // 64)
    rows = shapes["text.blocks.0.attn.qkv.weight"][0]
    _settle(folder, text, "text.n_kv_heads", "n_kv_heads", (rows // 64 - heads) // 2)
    for part, key in (("text", "n_layers"), ("vision", "enc_n_layers")):
        layers = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith(f"{part}.blocks."))
        _settle(folder, nested[part], f"{part}.{key}", key, layers)
    if "enc_n_heads" not in nested["vision"] and nested["vision"]["enc_dim"] % 72:
        raise CaptionTrainError(
            f"--model_id {folder}: config.json does not give vision.enc_n_heads, and "
            f"{nested['vision']['enc_dim']} is no multiple of the released models' 72"
        )
    release = revision if revision in REVISIONS else "2024-08-26" if old else DEFAULT_REVISION
    fields = native_dict({**official, "config": nested}, REVISIONS[release])
    if not any(name.startswith("region.") for name in shapes):
        fields["region"] = None
    return MoondreamConfig(**fields)


def _settle(folder: Path, nested: dict[str, Any], label: str, key: str, seen: int) -> None:
    told = nested.get(key)
    if told is not None and told != seen:
        raise CaptionTrainError(
            f"--model_id {folder}: config.json says {label} = {told}, the weights have {seen}"
        )
    nested[key] = seen


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptionTrainError(f"{path}: cannot be read: {error}") from error

"""Finds the files of a Moondream 2 in a folder or on the hub, and reads its weights and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.moondream.releases import RELEASES, TOKENIZER_NAMES
from caption_train.families.weight_files import open_weights, read_object, read_shard_names

END_OF_TEXT = "<|endoftext|>"
STARMIE = ("moondream/starmie-v1", "35192e10a54e36eabe0a7cc57a2c1aab371cafc5")
"""The tokenizer of 2025-06-21: the model's own repository still holds the older one."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find_folder(model_id: str | Path, revision: str | None, **kwargs: Any) -> Path:
    """Return the folder of a checkpoint; from the hub, its safetensors are downloaded, else its `.bin` files.

    Args:
        model_id: a folder, or a model on the hub.
        revision: branch, tag or commit on the hub.
        kwargs: `cache_dir`, `token` and `local_files_only` are passed to the download.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    from huggingface_hub import snapshot_download

    asked = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
    for patterns in (["*.json", "*.safetensors"], ["*.json", "*.bin"]):
        found = snapshot_download(str(model_id), revision=revision, allow_patterns=patterns, **asked)
        if find_weight_files(Path(found)):
            break
    return Path(found)


def find_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder: those an index lists, else one of a usual name, else the only one.

    With the official training script, users choose the file's name. So a single weight file of any name is
    taken.
    """
    for name in _WEIGHTS:
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in sorted(read_shard_names(index))]
        if (folder / name).is_file():
            return [folder / name]
    for pattern in ("*.safetensors", "*.pt"):
        found = [file for file in sorted(folder.glob(pattern)) if not file.name.startswith("adapter_")]
        if len(found) == 1:
            return found
    return []


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return all tensors of the files, on the CPU, mapped from the disk where possible."""
    return {name: tensor for file in files for name, tensor in _read_file(file).items()}


def find_dtype(model_id: str, revision: str | None = None) -> torch.dtype:
    """Return the precision of a checkpoint's weights; the widest, if there are several."""
    tensors = read_weights(find_weight_files(find_folder(model_id, revision)))
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if not kinds:
        raise CaptionTrainError(f"--model_id {model_id}: there are no weights in it")
    return max(kinds, key=lambda kind: kind.itemsize)


def check_sizes_given(folder: Path) -> None:
    """Raise CaptionTrainError if a folder's config.json does not say how large its model is.

    transformers would make a model of the released size first, which takes long, and then find that it does
    not fit the weights.
    """
    config = read_object(folder / "config.json")
    if absent := [
        part for part in ("text_config", "vision_config") if not isinstance(config.get(part), dict)
    ]:
        raise CaptionTrainError(f"--model_id {folder}: config.json has no {absent[0]}: copy it anew")


def read_tokenizer(model_id: str | Path, revision: str | None, bos_token_id: int) -> Any:
    """Return the tokenizer of an official checkpoint.

    Args:
        model_id: a folder, or a model on the hub.
        revision: branch, tag or commit on the hub.
        bos_token_id: what the model's sequences begin with; it differs between the two tokenizers.

    Raises:
        UsageError: the folder holds the other tokenizer, with which the text would be garbage; names both.
    """
    from transformers import PreTrainedTokenizerFast

    wanted = _tokenizer_name(bos_token_id)
    file = _find_tokenizer(model_id, revision, bos_token_id)
    if not file.is_file():
        raise UsageError(
            f"--model_id {model_id}: there is no tokenizer.json in it: its weights want that of {wanted}"
        )
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
            f"trained with {wanted}: put that tokenizer.json there, or name the release of the weights with "
            f"--revision ({', '.join(RELEASES)})"
        )
    return tokenizer


def _find_tokenizer(model_id: str | Path, revision: str | None, bos_token_id: int) -> Path:
    if Path(model_id).is_dir():
        return Path(model_id) / "tokenizer.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    source = STARMIE if TOKENIZER_NAMES.get(bos_token_id) == STARMIE[0] else (str(model_id), revision)
    try:
        return Path(hf_hub_download(source[0], "tokenizer.json", revision=source[1]))
    except LocalEntryNotFoundError as error:
        raise CaptionTrainError(
            f"--model_id {model_id}: its tokenizer, tokenizer.json of {source[0]}, is not in the local "
            "cache, and the hub cannot be reached: go online once, or give a folder that has it"
        ) from error


def _tokenizer_name(bos_token_id: int | None) -> str:
    return f"{TOKENIZER_NAMES.get(bos_token_id, 'another')} ({END_OF_TEXT} = {bos_token_id})"


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    contents, is_safe = open_weights(path), path.suffix == ".safetensors"
    return {n: value[...] for n, value in contents.items() if is_safe or isinstance(value, torch.Tensor)}

"""Reads a checkpoint's files directly, for layouts that transformers does not know."""

from __future__ import annotations

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError, is_out_of_memory
from caption_train.system.files import hash_file, read_json_object

MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".json", ".txt", ".model", ".jinja")
"""Files of a model that can change its captions: weights, settings, tokenizer, chat template."""
_PIECE = 1 << 20


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise CaptionTrainError if the file holds anything else."""
    try:
        return read_json_object(path)
    except OSError as error:
        raise CaptionTrainError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_shard_names(index: Path) -> list[str]:
    """Return the names of the weight files that an index.json lists, each once."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CaptionTrainError(f"{index} has no weight_map: copy it again")
    return list(dict.fromkeys(map(str, weight_map.values())))


def open_weights(path: Path) -> dict[str, Any]:
    """Open a weight file without running any code in it.

    Args:
        path: a .safetensors file, or a file that `torch.load` reads with `weights_only=True`.

    Returns:
        Name → tensor slice that is read when indexed (safetensors), or name → whatever the file holds.

    Raises:
        CaptionTrainError: the file is damaged, or holds code, or holds no names.
    """
    import torch
    from safetensors import safe_open

    damaged = f"{path} is damaged, or holds other things than tensors"
    if not path.is_file():
        raise CaptionTrainError(f"{path} is not a regular file")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch and safetensors have no common type for a damaged file
        if is_out_of_memory(error):
            raise
        raise CaptionTrainError(damaged) from error
    if not isinstance(contents, dict):
        raise CaptionTrainError(damaged)
    return contents


def fingerprint_model(folder: Path | str) -> str | None:
    """Return a hash of the model in a folder, independent of the folder's path; None if it is no folder.

    Of large files, only the size and a megabyte at each end are hashed: training from scratch changes those
    too. A merged LoRA may not; `hash_model` reads everything.
    """
    if not Path(folder).is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(f"{path.name} {size} ".encode() + file.read(_PIECE))
                file.seek(max(size - _PIECE, 0))
                found.update(file.read(_PIECE))
    return found.hexdigest()[:16]


def hash_model(folder: Path | str) -> str | None:
    """Return a hash of all weights and settings of the model in a folder; None if it is no folder."""
    if not Path(folder).is_dir():
        return None
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix in MODEL_SUFFIXES and p.is_file())
    with ThreadPoolExecutor(4) as pool:
        hashes = [
            f"{path.name} {found}" for path, found in zip(paths, pool.map(hash_file, paths), strict=True)
        ]
    return hashlib.sha256("\n".join(hashes).encode(errors="surrogateescape")).hexdigest()[:16]


def fetch_commit(model_id: str, revision: str | None = None) -> str | None:
    """Return the commit of a model on the hub as it is now, or of the hub's cache where there is no network.

    None for a folder, and where neither knows the model.
    """
    if Path(model_id).is_dir():
        return None
    from huggingface_hub import hf_hub_download

    # Whatever the reason is: loading the model will say it better.
    with suppress(Exception):
        hf_hub_download(model_id, "config.json", revision=revision)
    return find_commit(model_id, revision)


def find_commit(model_id: str, revision: str | None = None) -> str | None:
    """Return the commit of a model in the hub's cache, or None for a folder. Uses no network."""
    if Path(model_id).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None

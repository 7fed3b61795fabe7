"""Finds the files of a Florence-2 checkpoint in a folder or on the hub, and opens its weights lazily."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.florence.legacy.names import LEGACY_STARTS
from caption_train.families.loading import explained, find_side_files, shorten
from caption_train.families.weight_files import open_weights, read_object, read_shard_names

if TYPE_CHECKING:
    import torch

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model.

    Attributes:
        model_id: the folder or hub id as the user gave it.
        folder: the folder with config.json and the tokenizer.
        weights: the weight files, shards in order.
    """

    model_id: str
    folder: Path
    weights: tuple[Path, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_object(self.folder / "config.json")

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Name → tensor, or slice of a safetensors file that is read when indexed with `[...]`."""
        return {name: tensor for path in self.weights for name, tensor in open_tensors(path).items()}

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the stored weights; the widest, if there are several."""
        kinds = {_dtype_of(tensor) for tensor in self.tensors.values()}
        return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: kind.itemsize)

    @property
    def is_legacy(self) -> bool:
        """Whether this is Microsoft's layout, judged by its config, or else by the names of its tensors.

        Microsoft's code is found through `auto_map`, so `model_type` may be missing.
        """
        if self.config.get("model_type") not in (None, "", "florence2"):
            return False
        vision = self.config.get("vision_config") or {}
        return "dim_embed" in vision or any(name.startswith(LEGACY_STARTS) for name in self.tensors)


def find_checkpoint(model_id: str, revision: str | None = None) -> Checkpoint:
    """Find the files of a model, and download what is missing.

    Args:
        model_id: a folder, or a model on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        CaptionTrainError: the config or a weight file is missing.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with explained(model_id):
        local = Path(model_id).is_dir()
        folder = find_side_files(model_id, revision)
        unreachable = ""

        def find(name: str) -> Path | None:
            nonlocal unreachable
            if local or (folder / name).is_file():
                return folder / name if (folder / name).is_file() else None
            try:
                return Path(hf_hub_download(model_id, name, revision=folder.name))
            except LocalEntryNotFoundError:
                unreachable = " in the local cache, and the hub cannot be reached"
            except EntryNotFoundError:
                pass
            return None

        if find("config.json") is None:
            raise CaptionTrainError(f"--model_id {model_id}: there is no config.json, so this is no model")
        found = next((path for name in WEIGHTS if (path := find(name))), None)
        if found is None:
            raise CaptionTrainError(
                f"--model_id {model_id}: there are no weights{unreachable}: none of {', '.join(WEIGHTS)}"
            )
        names = [found.name]
        if found.name.endswith(".index.json"):
            names = read_shard_names(found)
        weights = {name: find(name) for name in names}
    if absent := [name for name, path in weights.items() if path is None]:
        raise CaptionTrainError(
            f"--model_id {model_id}: {found.name} names {shorten(absent)}, not there{unreachable}"
        )
    return Checkpoint(model_id, folder, tuple(weights.values()))


def shape_of(tensor: Any) -> list[int]:
    """Return the shape of a tensor or of a slice of a safetensors file."""
    return list(tensor.shape) if hasattr(tensor, "shape") else tensor.get_shape()


def _dtype_of(tensor: Any) -> torch.dtype:
    import torch

    return tensor.dtype if isinstance(tensor, torch.Tensor) else tensor[:0].dtype


def open_tensors(path: Path) -> dict[str, Any]:
    """Open a weight file as `open_weights` does; raise CaptionTrainError if it holds more than tensors."""
    import torch

    contents = open_weights(path)
    if path.suffix == ".safetensors":
        return contents
    if other := [str(name) for name, value in contents.items() if not isinstance(value, torch.Tensor)]:
        raise CaptionTrainError(f"{path} holds other things than tensors: {shorten(other)}")
    return contents

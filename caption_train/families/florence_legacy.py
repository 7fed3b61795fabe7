"""Legacy Florence-2 checkpoints, Microsoft's and every fine-tune's made from them: found and converted.

transformers 5 does not know the layout: it fails, or loads a base model as random weights without an error.
So every tensor is accounted for here, by name and shape, before one is loaded.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.florence_config import convert_config, is_lost, make_generation_config
from caption_train.families.florence_names import LEGACY_STARTS, LOGITS_BIAS, TIED, legacy_name, native_name
from caption_train.families.florence_processor import convert_processor
from caption_train.families.loading import explained, load_model, load_processor, shorten

if TYPE_CHECKING:
    import torch
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SIDE_FILES = ["*.json", "*.txt"]
"""Configs, tokenizer and image settings, next to the weights on the hub."""

RECOMPUTABLE = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model: `folder` with its config and tokenizer, and its weight files, shards in order."""

    model_id: str
    folder: Path
    weights: tuple[Path, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is."""
        try:
            return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CaptionTrainError(f"{self.folder / 'config.json'} is not JSON: {error}") from error

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Name → tensor, or a slice of a safetensors file that is read when indexed with `[...]`."""
        return {name: tensor for path in self.weights for name, tensor in _open_weights(path).items()}

    @property
    def dtype(self) -> torch.dtype:
        """The precision the weights are stored in, the widest if there are several."""
        kinds = {_dtype_of(tensor) for tensor in self.tensors.values()}
        return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: kind.itemsize)

    @property
    def is_legacy(self) -> bool:
        """Whether this is Microsoft's layout, by its config or else by its tensors' names."""
        if self.config.get("model_type") != "florence2":
            return False
        vision = self.config.get("vision_config") or {}
        return "dim_embed" in vision or any(name.startswith(LEGACY_STARTS) for name in self.tensors)


def find_checkpoint(model_id: str, revision: str | None = None) -> Checkpoint:
    """Find the files of a folder or hub id, downloading what is missing."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    with explained(model_id):
        local = Path(model_id).is_dir()
        folder = Path(
            model_id if local else snapshot_download(model_id, revision=revision, allow_patterns=SIDE_FILES)
        )

        def find(name: str) -> Path | None:
            if local or (folder / name).is_file():
                return folder / name if (folder / name).is_file() else None
            try:
                return Path(hf_hub_download(model_id, name, revision=folder.name))
            except EntryNotFoundError:
                return None

        if find("config.json") is None:
            raise CaptionTrainError(f"--model_id {model_id}: there is no config.json, so this is no model")
        found = next((path for name in WEIGHTS if (path := find(name))), None)
        if found is None:
            raise CaptionTrainError(
                f"--model_id {model_id}: there are no weights: none of {', '.join(WEIGHTS)}"
            )
        names = [found.name]
        if found.name.endswith(".index.json"):
            names = list(dict.fromkeys(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        weights = {name: find(name) for name in names}
    if absent := [name for name, path in weights.items() if path is None]:
        raise CaptionTrainError(f"--model_id {model_id}: {found.name} names {shorten(absent)}, not there")
    return Checkpoint(model_id, folder, tuple(weights.values()))


def load_legacy(
    checkpoint: Checkpoint, *, dtype: torch.dtype, quantization_config: Any = None
) -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    """Load a legacy checkpoint into transformers' own class, eval mode, with the generation settings it had.

    Raises CaptionTrainError, naming them, for tensors that are left over, missing or of another shape.
    """
    from transformers import Florence2ForConditionalGeneration

    config, processor, state = convert_checkpoint(checkpoint)
    model, info = Florence2ForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        quantization_config=quantization_config,
        output_loading_info=True,
    )
    if left := sorted({*info["missing_keys"], *info["unexpected_keys"]} - {RECOMPUTABLE}):
        raise CaptionTrainError(f"--model_id {checkpoint.model_id}: not loaded: {shorten(left)}")
    model.generation_config = make_generation_config(checkpoint.config.get("text_config") or {})
    return _name(model.eval(), checkpoint), processor


def convert_checkpoint(
    checkpoint: Checkpoint,
) -> tuple[Florence2Config, Florence2Processor, dict[str, Any]]:
    """Return config, processor and tensors as the native class has them; safetensors are not read yet."""
    shapes = {name: tuple(shape_of(tensor)) for name, tensor in checkpoint.tensors.items()}
    rows = next((shapes[name][0] for name in TIED.values() if name in shapes), 0)
    try:
        state, tied = convert_tensors(checkpoint.tensors)
        config = convert_config(checkpoint.config, shapes, tied=tied, image_token_id=0)
        processor = convert_processor(checkpoint.folder, config.vision_config.to_dict(), rows)
        config.image_token_id = processor.image_token_id
        check_complete(config, state)
    except CaptionTrainError as error:
        raise CaptionTrainError(f"--model_id {checkpoint.model_id}: {error}") from error
    return config, processor, state


def load_native(
    checkpoint: Checkpoint, *, dtype: torch.dtype, quantization_config: Any = None
) -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    """Load a native checkpoint, eval mode; generation settings that were lost on the way are put back."""
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    model = load_model(
        Florence2ForConditionalGeneration,
        str(checkpoint.folder),
        dtype=dtype,
        quantization_config=quantization_config,
    )
    saved = model.generation_config.to_diff_dict()
    if is_lost(saved):
        text_config = checkpoint.config.get("text_config") or {}
        model.generation_config = make_generation_config(text_config, saved)
    return _name(model, checkpoint), load_processor(AutoProcessor.from_pretrained, str(checkpoint.folder))


def convert_tensors(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the tensors by native names, an embedding once, and whether the head is the embedding."""
    tensors = dict(tensors)
    bias = tensors.pop(LOGITS_BIAS, None)
    if bias is not None and bias[...].any():
        raise CaptionTrainError(f"{LOGITS_BIAS} is not zero, and transformers' Florence-2 has no such bias")
    embeddings = {role: tensors.pop(name) for role, name in TIED.items() if name in tensors}
    if not embeddings:
        raise CaptionTrainError(f"the checkpoint has no embedding: none of {', '.join(TIED.values())}")
    head = embeddings.pop("head", None)
    shared, *copies = [*embeddings.items()] or [("head", head)]
    for role, copy in copies:
        if not _equal(shared[1], copy):
            raise CaptionTrainError(
                f"{TIED[shared[0]]} and {TIED[role]} differ, but are one embedding in the original"
            )
    if unknown := [name for name in tensors if native_name(name) is None]:
        raise CaptionTrainError(
            f"{len(unknown)} tensors are no part of Florence-2: {shorten(sorted(unknown))}"
        )
    state = {native_name(name): tensor for name, tensor in tensors.items()}
    projection = native_name("image_projection")
    if projection in state:
        state[projection] = state[projection][...].T.contiguous()
    state[native_name(TIED["shared"])] = shared[1]
    tied = head is None or _equal(shared[1], head)
    if not tied:
        state[native_name(TIED["head"])] = head
    return state, tied


def check_complete(config: Florence2Config, state: Mapping[str, Any]) -> None:
    """Raise CaptionTrainError unless `state` has exactly the tensors and shapes that `config` asks for."""
    import torch
    from transformers import Florence2ForConditionalGeneration

    with torch.device("meta"):
        expected = Florence2ForConditionalGeneration(config).state_dict()
    embeddings = {native_name(name) for name in TIED.values()}
    derived = {RECOMPUTABLE, *(name for name in embeddings if name not in state)}
    problems = []
    if missing := sorted(_say(name) for name in expected.keys() - state.keys() - derived):
        problems.append(f"{len(missing)} tensors are missing: {shorten(missing)}")
    if extra := sorted(_say(name) for name in state.keys() - expected.keys()):
        problems.append(f"{len(extra)} tensors are left over: {shorten(extra)}")
    wrong = [
        f"{_say(name)} {tuple(shape_of(state[name]))} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if tuple(shape_of(state[name])) != tuple(expected[name].shape)
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape than config.json says: {shorten(wrong)}")
    if problems:
        raise CaptionTrainError("; ".join(problems))


def shape_of(tensor: Any) -> list[int]:
    """Return the shape of a tensor or of a slice of a safetensors file."""
    return list(tensor.shape) if hasattr(tensor, "shape") else tensor.get_shape()


def _dtype_of(tensor: Any) -> torch.dtype:
    import torch

    return tensor.dtype if isinstance(tensor, torch.Tensor) else tensor[:0].dtype


def _name(
    model: Florence2ForConditionalGeneration, checkpoint: Checkpoint
) -> Florence2ForConditionalGeneration:
    """Let adapters that are saved from the model name it as the user did, not by a folder of the cache."""
    model.name_or_path = model.config.name_or_path = checkpoint.model_id
    return model


def _say(name: str) -> str:
    return legacy_name(name) or name


def _equal(first: Any, second: Any) -> bool:
    import torch

    return shape_of(first) == shape_of(second) and torch.equal(first[...], second[...])


def _open_weights(path: Path) -> dict[str, Any]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise CaptionTrainError(f"{path} is damaged, or holds other things than tensors") from error

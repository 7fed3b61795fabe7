"""Loads Florence-2 checkpoints in Microsoft's layout, as they and most fine-tunes are published.

transformers 5 does not know this layout: it fails, or silently loads a base model with random weights. So
every tensor is checked by name and shape before one is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.florence.files import Checkpoint, shape_of
from caption_train.families.florence.legacy.config import (
    convert_config,
    is_lost,
    make_generation_config,
)
from caption_train.families.florence.legacy.names import LOGITS_BIAS, TIED, legacy_name, native_name
from caption_train.families.florence.legacy.processor import convert_processor, load_tokenizer
from caption_train.families.loading import (
    find_side_files,
    load_config,
    load_model,
    load_processor,
    shorten,
)
from caption_train.families.prompt_length import note_positions

if TYPE_CHECKING:
    import torch
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

RECOMPUTABLE = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"


def load_legacy(
    checkpoint: Checkpoint, *, dtype: torch.dtype, quantization_config: Any = None
) -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    """Load a legacy checkpoint into transformers' own class, in eval mode, with its generation settings.

    Args:
        checkpoint: the files.
        dtype: precision of the weights.
        quantization_config: how to quantize the weights, if at all.

    Raises:
        CaptionTrainError: names the tensors that are missing, left over or of another shape.
    """
    model, processor, state = convert_checkpoint(checkpoint)
    if quantization_config is None:
        fill_model(model, state, dtype)
    else:
        model = _load_quantized(model.config, state, dtype, quantization_config)
    model.generation_config = make_generation_config(checkpoint.config.get("text_config") or {})
    return _name(model.eval(), checkpoint), processor


def convert_checkpoint(
    checkpoint: Checkpoint,
) -> tuple[Florence2ForConditionalGeneration, Florence2Processor, dict[str, Any]]:
    """Convert config, processor and tensors of a legacy checkpoint.

    Returns:
        The native model on the meta device, its processor, and all its tensors; slices of safetensors files
        are not read yet.

    Raises:
        CaptionTrainError: the files do not describe a complete Florence-2.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Florence2ForConditionalGeneration

    shapes = {name: tuple(shape_of(tensor)) for name, tensor in checkpoint.tensors.items()}
    rows = next((shapes[name][0] for name in TIED.values() if name in shapes), 0)
    try:
        state, tied = convert_tensors(checkpoint.tensors)
        config = convert_config(checkpoint.config, shapes, tied=tied, image_token_id=0)
        state.setdefault(RECOMPUTABLE, compute_temporal_embedding(config))
        processor = convert_processor(checkpoint.folder, config.vision_config.to_dict(), rows)
        config.image_token_id = processor.image_token_id
        with torch.device("meta"):
            model = Florence2ForConditionalGeneration(config)
        check_complete(model, state)
    except CaptionTrainError as error:
        raise CaptionTrainError(f"--model_id {checkpoint.model_id}: {error}") from error
    except (TypeError, ValueError, LookupError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CaptionTrainError(
            f"--model_id {checkpoint.model_id}: config.json describes no Florence-2: {reason}"
        ) from error
    return model, processor, state


def fill_model(
    model: Florence2ForConditionalGeneration, state: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Give a model on the meta device its tensors; those stored in `dtype` stay mapped to the file.

    This is three times as fast as `from_pretrained`, which makes a renaming rule for every tensor.
    """
    tensors = {name: tensor[...].detach().to(dtype) for name, tensor in state.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config.dtype = dtype
    if empty := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise CaptionTrainError(f"not loaded: {shorten(empty)}")


def _load_quantized(
    config: Florence2Config, state: dict[str, Any], dtype: torch.dtype, quantization_config: Any
) -> Florence2ForConditionalGeneration:
    from transformers import Florence2ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Florence2ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, quantization_config=quantization_config
    )


def compute_temporal_embedding(config: Florence2Config) -> torch.Tensor:
    """Return the table [frames, C], which is the same for all checkpoints, so not all of them contain it."""
    from transformers.models.florence2.modeling_florence2 import Florence2VisionPositionalEmbeddingCosine1D

    return Florence2VisionPositionalEmbeddingCosine1D(config).pos_idx_to_embed


def load_native(
    checkpoint: Checkpoint, *, dtype: torch.dtype, quantization_config: Any = None
) -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    """Load a native checkpoint in eval mode; restore generation settings that an earlier conversion lost."""
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    folder = str(checkpoint.folder)
    try:
        model = load_model(
            Florence2ForConditionalGeneration,
            folder,
            strict=True,
            dtype=dtype,
            quantization_config=quantization_config,
        )
        processor = load_processor(AutoProcessor.from_pretrained, folder)
    except CaptionTrainError as error:
        raise type(error)(str(error).replace(folder, checkpoint.model_id)) from error
    saved = model.generation_config.to_diff_dict()
    if is_lost(saved):
        text_config = checkpoint.config.get("text_config") or {}
        model.generation_config = make_generation_config(text_config, saved)
    return _name(model, checkpoint), processor


def load_text_processor(model_id: str, revision: str | None = None) -> Any:
    """Return a checkpoint's processor, or of a legacy one what it has for texts, without its weights."""
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    checkpoint = Checkpoint(model_id, find_side_files(model_id, revision), ())
    if checkpoint.is_legacy:
        text = checkpoint.config.get("text_config") or {}
        tokenizer = load_tokenizer(checkpoint.folder, text.get("vocab_size", sys.maxsize))
        tokenizer.model_max_length = text.get("max_position_embeddings", 1024)
        return SimpleNamespace(tokenizer=tokenizer, image_token=tokenizer.image_token)
    config = load_config(Florence2ForConditionalGeneration, str(checkpoint.folder))
    processor = load_processor(AutoProcessor.from_pretrained, str(checkpoint.folder))
    note_positions(config, processor)
    return processor


def convert_tensors(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Rename a checkpoint's tensors.

    Args:
        tensors: legacy name → tensor or slice.

    Returns:
        Native name → tensor, with the shared embedding once; and whether the head equals the embedding.

    Raises:
        CaptionTrainError: a tensor is unknown, or embeddings differ that must be one.
    """
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
    names = {name: native_name(name) for name in tensors}
    if unknown := [name for name, new in names.items() if new is None]:
        raise CaptionTrainError(
            f"{len(unknown)} tensors are no part of Florence-2: {shorten(sorted(unknown))}"
        )
    state = {names[name]: tensor for name, tensor in tensors.items()}
    projection = native_name("image_projection")
    if projection in state:
        state[projection] = state[projection][...].T.contiguous()
    state[native_name(TIED["shared"])] = shared[1]
    tied = head is None or _equal(shared[1], head)
    if not tied:
        state[native_name(TIED["head"])] = head
    return state, tied


def check_complete(model: Florence2ForConditionalGeneration, state: Mapping[str, Any]) -> None:
    """Raise CaptionTrainError unless `state` has exactly the tensors of `model`, in the same shapes."""
    expected = model.state_dict()
    embeddings = {native_name(name) for name in TIED.values()}
    problems = []
    if missing := sorted(_say(name) for name in expected.keys() - state.keys() - embeddings):
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


def _name(
    model: Florence2ForConditionalGeneration, checkpoint: Checkpoint
) -> Florence2ForConditionalGeneration:
    """Set the model's name to what the user gave, not to a cache folder: saved adapters record it."""
    model.name_or_path = model.config.name_or_path = checkpoint.model_id
    return model


def _say(name: str) -> str:
    return legacy_name(name) or name


def _equal(first: Any, second: Any) -> bool:
    import torch

    if shape_of(first) != shape_of(second):
        return False
    first, second = first[...], second[...]
    # In a .bin file, tied tensors are one tensor under four names, so their values need not be compared.
    same = first.data_ptr() == second.data_ptr() and first.dtype == second.dtype
    return same or torch.equal(first, second)

"""Writes Florence-2 and its adapters in Microsoft's layout, and prepares adapters for merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.florence.legacy.adapter import (
    PREFIX,
    Adapter,
    convert_adapter,
    drop_base_copies,
    read_adapter_files,
    restore_adapter,
)
from caption_train.families.florence.legacy.config import restore_config
from caption_train.families.florence.legacy.names import LOGITS_BIAS, TIED, legacy_name, native_name
from caption_train.system.files import write_atomically

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import Florence2ForConditionalGeneration, Florence2Processor, PreTrainedTokenizerBase

CODE_FILES = ("configuration_florence2.py", "modeling_florence2.py", "processing_florence2.py")
"""Microsoft's code for `trust_remote_code`: copied if the base's folder has it, never run here."""


def save_legacy(
    model: Florence2ForConditionalGeneration, processor: Florence2Processor, folder: Path
) -> None:
    """Write a native model as Microsoft's code reads it: config, weights, tokenizer and image settings."""
    from safetensors.torch import save_file

    # Cloned, because safetensors refuses tensors that share memory, as the tied ones do.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in restore_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings, dtype = model.generation_config, str(model.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", restore_config(model.config, settings, dtype))
    _write_json(
        folder / "generation_config.json",
        {"num_beams": settings.num_beams or 1, "early_stopping": bool(settings.early_stopping)},
    )
    _save_tokenizer(processor.tokenizer, processor.image_token, folder)
    _save_image_settings(processor, folder)
    for name in CODE_FILES:
        if (path := Path(model.name_or_path) / name).is_file():
            shutil.copyfile(path, folder / name)


def restore_tensors(model: Florence2ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return a native model's tensors under their legacy names: the inverse of `convert_tensors`.

    All four tied names are written, because Microsoft's code leaves a head random if it is not in the file.
    """
    state = model.state_dict()
    if unknown := [name for name in state if legacy_name(name) is None]:
        raise CaptionTrainError(f"the legacy layout has no place for {unknown[0]}: merge the adapter first")
    tensors = {legacy_name(name): tensor for name, tensor in state.items()}
    tensors["image_projection"] = tensors["image_projection"].T.contiguous()
    shared = state[native_name(TIED["shared"])]
    tensors[LOGITS_BIAS] = shared.new_zeros(1, shared.shape[0])
    return tensors


def save_adapter(
    model: Florence2ForConditionalGeneration, source: Path | str, folder: Path, *, legacy: bool
) -> None:
    """Write an adapter in the other layout.

    Args:
        model: the native base model; it tells copies of the base's weights in the file from the adapter's
            own.
        source: the adapter's folder.
        folder: the folder to write to.
        legacy: whether to write legacy names or native ones.

    Raises:
        UsageError: the adapter is in this layout already.
    """
    from safetensors.torch import save_file

    adapter = read_adapter_files(source)
    if adapter.is_legacy == legacy:
        layout = "legacy" if legacy else "native"
        raise UsageError(f"{source} is in the {layout} layout already; --merge writes the whole model")
    if legacy:
        drop_base_copies(adapter, model)
        adapter = restore_adapter(adapter)
    else:
        config, weights = convert_adapter(source, model)
        config = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in config.to_dict().items()
        }
        adapter = Adapter(config, {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()})
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "adapter_config.json", adapter.config)


def prepare_merge(model: PeftModel) -> None:
    """Make an adapter mergeable: if it changes the head, the head gets its own weights.

    A tied head shares its weights with the input embedding, which a merge would change too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from torch import nn

    base = model.get_base_model()
    head = base.lm_head
    if not isinstance(head, (BaseTunerLayer, ModulesToSaveWrapper)):
        return
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head.original_module
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str, folder: Path) -> None:
    """Write the tokenizer without the parts that transformers 4 and older tokenizers cannot read."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    content["model"]["merges"] = merges
    # An image token taken from the vocabulary (see `_choose_image_token`) is plain text to Microsoft's code.
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if token["content"] != image_token or image_token not in vocabulary
    ]
    content |= {"padding": None, "truncation": None}
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "vocab.json", vocabulary)
    write_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    length = min(tokenizer.model_max_length, 1024)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BartTokenizer",
            "model_max_length": length,
            "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        },
    )


def _save_image_settings(processor: Florence2Processor, folder: Path) -> None:
    images = processor.image_processor
    size = {"height": images.size["height"], "width": images.size["width"]}
    _write_json(
        folder / "preprocessor_config.json",
        {
            "auto_map": {"AutoProcessor": "processing_florence2.Florence2Processor"},
            "processor_class": "Florence2Processor",
            "image_processor_type": "CLIPImageProcessor",
            "image_seq_length": processor.num_image_tokens,
            "do_convert_rgb": None,
            "do_resize": True,
            "size": size,
            "resample": int(images.resample),
            "do_center_crop": False,
            "crop_size": size,
            "do_rescale": images.do_rescale,
            "rescale_factor": images.rescale_factor,
            "do_normalize": images.do_normalize,
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

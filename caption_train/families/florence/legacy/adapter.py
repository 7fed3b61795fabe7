"""Converts LoRA adapters of Florence-2 between Microsoft's layout and transformers'.

If no name of an adapter matches, PEFT loads it without an error, as zeros. So every tensor is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.florence.files import open_tensors
from caption_train.families.florence.legacy.names import (
    LEGACY_STARTS,
    LOGITS_BIAS,
    legacy_name,
    native_name,
)
from caption_train.families.loading import shorten
from caption_train.families.weight_files import read_object

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import Florence2ForConditionalGeneration

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
EMBEDDINGS = ("shared", "embed_tokens")

REPLACED = {
    **{"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None},
    **{"auto_mapping": None, "target_parameters": None},
}
"""Fields with names of modules or classes; the explicit list of target modules replaces them all."""

UNSUPPORTED = ("target_parameters", "trainable_token_indices", "layer_replication")
"""Fields for adapters of something other than modules, which cannot be converted."""

CORE_FIELDS = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "fan_in_fan_out"),
    *("init_lora_weights", "rank_pattern", "alpha_pattern", "use_rslora"),
)
"""Fields that adapter_config.json has had since PEFT 0.8."""

KNOWN_STARTS = ("True", "False", "gaussian", "pissa", "olora", "loftq", "eva")
"""Initializations of a LoRA that PEFT 0.14 knows; any other is an error there."""


@dataclass
class Adapter:
    """An adapter as its files describe it: adapter_config.json, and tensors by name without PEFT's prefix."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def is_legacy(self) -> bool:
        """Whether it was trained on Microsoft's code; native names start with `model.` or `lm_head.`."""
        return any(name.startswith(LEGACY_STARTS) for name in self.tensors)

    def ranks(self) -> dict[str, int]:
        """Return module → rank of its LoRA, which is the first dimension of A [rank, …]."""
        return {
            _module(name): tensor.shape[0]
            for name, tensor in self.tensors.items()
            if name.endswith((".lora_A.weight", ".lora_embedding_A"))
        }

    def alphas(self) -> dict[str, float]:
        """Return module → alpha, found in the same way as PEFT does."""
        from peft.utils.other import get_pattern_key

        pattern = self.config.get("alpha_pattern") or {}
        default = self.config["lora_alpha"]
        return {name: pattern.get(get_pattern_key(pattern, name), default) for name in self.ranks()}

    def saved_modules(self) -> list[str]:
        """Return the innermost modules of `modules_to_save`, whose full weights are in the file."""
        wanted = self.config.get("modules_to_save") or []
        parents = {name.rpartition(".")[0] for name in self.tensors if "lora_" not in name}
        return sorted(name for name in parents if any(is_part(name, module) for module in wanted))


def read_adapter_files(folder: Path | str) -> Adapter:
    """Read an adapter's config and tensors, from safetensors or from a `.bin` (weights only, no code)."""
    folder = Path(folder)
    config = {"r": 8, "lora_alpha": 8} | read_object(folder / "adapter_config.json")
    path = next((path for name in WEIGHTS if (path := folder / name).is_file()), None)
    if path is None:
        raise CaptionTrainError(f"--peft_model {folder}: there are no weights: none of {', '.join(WEIGHTS)}")
    tensors = {name.removeprefix(PREFIX): tensor[...] for name, tensor in open_tensors(path).items()}
    return Adapter(config, tensors)


def convert_adapter(
    folder: Path | str, model: Florence2ForConditionalGeneration
) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
    """Convert a legacy adapter for a native model.

    Args:
        folder: the adapter's folder.
        model: the native base model.

    Returns:
        PEFT's config and weights, for exactly the modules that the config targets or saves; None if the
        adapter is native already.

    Raises:
        CaptionTrainError: names the tensors that have no place in `model`.
    """
    from peft import LoraConfig

    adapter = read_adapter_files(folder)
    if not adapter.is_legacy:
        return None
    try:
        bias = adapter.tensors.pop(LOGITS_BIAS, None)
        if bias is not None and bias.any():
            raise CaptionTrainError(f"{LOGITS_BIAS} is not zero; transformers' Florence-2 has no such bias")
        native = rename_adapter(adapter, native_name)
        settle_biases(native, model)
        drop_base_copies(native, model)
        fit_vocabulary(native, model)
    except CaptionTrainError as error:
        raise CaptionTrainError(f"--peft_model {folder}: {error}") from error
    modules = dict(model.named_modules())
    if absent := sorted({*native.ranks(), *native.saved_modules()} - modules.keys()):
        raise CaptionTrainError(f"--peft_model {folder}: the base has no {shorten(absent)}")
    weights = {PREFIX + name: tensor for name, tensor in native.tensors.items()}
    # With a task type, PEFT would wrap the model in a class for text, whose `forward` takes no pixels.
    return LoraConfig.from_peft_type(**native.config | {"task_type": None}), weights


def rename_adapter(adapter: Adapter, rename: Callable[[str], str | None]) -> Adapter:
    """Return the adapter with every module renamed; the config lists each module by its full name.

    Args:
        adapter: the adapter.
        rename: old name → new name, or None if there is none.

    Raises:
        CaptionTrainError: a name has no counterpart, or the adapter uses a feature that cannot be converted.
    """
    config = adapter.config
    if config.get("peft_type") != "LORA":
        raise CaptionTrainError(f"{config.get('peft_type')} adapters cannot be converted, only LORA")
    for field in UNSUPPORTED:
        if config.get(field):
            raise CaptionTrainError(f"adapters with {field} cannot be converted")
    if not adapter.ranks():
        raise CaptionTrainError(f"there is no LoRA of any module in it, but {shorten([*adapter.tensors])}")
    names = {name: rename(name) for name in adapter.tensors}
    modules = {name: rename(name) for name in {*adapter.ranks(), *adapter.saved_modules()}}
    if unknown := sorted(name for name, new in (names | modules).items() if new is None):
        raise CaptionTrainError(f"{len(unknown)} names have no counterpart: {shorten(unknown)}")
    wanted = config.get("modules_to_save") or []
    saved = adapter.saved_modules()
    if empty := [module for module in wanted if not any(is_part(name, module) for name in saved)]:
        raise CaptionTrainError(f"modules_to_save names {shorten(empty)}, but the file has no such tensors")
    ranks, alphas = adapter.ranks(), adapter.alphas()
    config = config | {field: value for field, value in REPLACED.items() if field in config}
    config |= {
        "target_modules": sorted(modules[name] for name in ranks),
        "modules_to_save": sorted(modules[name] for name in adapter.saved_modules()) or None,
        "rank_pattern": {modules[name]: rank for name, rank in ranks.items() if rank != config["r"]},
        "alpha_pattern": {
            modules[name]: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]
        },
    }
    return Adapter(config, {names[name]: tensor for name, tensor in adapter.tensors.items()})


def settle_biases(adapter: Adapter, model: Florence2ForConditionalGeneration) -> None:
    """Rename trained biases to what PEFT calls them, and add those that the file lacks from the base.

    PEFT before 0.5 names a target's bias as the base does. Later versions forget them all with
    `bias="lora_only"`.
    """
    kind, targets = adapter.config.get("bias", "none"), adapter.ranks().keys()
    for name, own in model.named_parameters() if kind != "none" else ():
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or (kind != "all" and module not in targets):
            continue
        wrapped = f"{module}.base_layer.bias" if module in targets else name
        found = adapter.tensors.pop(name, own.detach())
        adapter.tensors.setdefault(wrapped, found)


def drop_base_copies(adapter: Adapter, model: Florence2ForConditionalGeneration) -> None:
    """Remove copies of the base's embeddings, which PEFT saves with a LoRA on them; raise if they differ."""
    import torch

    saved = tuple(f"{name}." for name in adapter.saved_modules())
    base = dict(model.named_parameters(remove_duplicate=False))
    for name in [name for name in adapter.tensors if "lora_" not in name and not name.startswith(saved)]:
        if adapter.config.get("bias", "none") != "none" and name.endswith(".bias"):
            continue
        tensor, own = adapter.tensors[name], base.get(name.replace(".base_layer.", "."))
        rows = len(tensor) if tensor.ndim else 0
        if own is None or not torch.equal(own[:rows], tensor.to(own.dtype)):
            raise CaptionTrainError(f"{name} is neither LoRA, nor in modules_to_save, nor the base's own")
        del adapter.tensors[name]


def fit_vocabulary(adapter: Adapter, model: Florence2ForConditionalGeneration) -> None:
    """Extend tensors with a row per vocabulary entry to the base's size, by zeros or the base's own rows."""
    import torch

    rows = model.get_output_embeddings().weight.shape[0]
    for name, tensor in adapter.tensors.items():
        module = _module(name).removesuffix(".weight")
        dim = 1 if name.endswith("lora_embedding_A") else 0
        if not is_part(module, "lm_head", *EMBEDDINGS) or name.endswith(
            ("lora_A.weight", "lora_embedding_B")
        ):
            continue
        missing = rows - tensor.shape[dim]
        if missing < 0:
            raise CaptionTrainError(
                f"{name} has {tensor.shape[dim]} vocabulary entries, the base only {rows}"
            )
        if missing and "magnitude" in name:
            raise CaptionTrainError(f"{name} (DoRA) has {missing} vocabulary entries less than the base")
        if missing:
            own = model.get_parameter(name)[-missing:] if "lora_" not in name else None
            shape = [missing if axis == dim else size for axis, size in enumerate(tensor.shape)]
            filler = tensor.new_zeros(shape) if own is None else own.detach().to(tensor.dtype)
            adapter.tensors[name] = torch.cat([tensor, filler], dim=dim)


def restore_adapter(adapter: Adapter) -> Adapter:
    """Convert a native adapter for legacy tools: legacy names, and no config field that an old PEFT lacks."""
    from peft import LoraConfig

    legacy = rename_adapter(adapter, legacy_name)
    defaults = LoraConfig().to_dict()
    config = {
        name: value
        for name, value in legacy.config.items()
        if name in CORE_FIELDS or (value and value != defaults.get(name) and name != "peft_version")
    }
    if str(config.get("init_lora_weights")).partition("_")[0] not in KNOWN_STARTS:
        config["init_lora_weights"] = True  # only matters before training, and the weights are in the file
    return Adapter(config, legacy.tensors)


def _module(name: str) -> str:
    """Return the module in a tensor's name: the part before `.lora_`, or the whole name."""
    return name.partition(".lora_")[0]


def is_part(name: str, *modules: str) -> bool:
    """Tell whether a dotted name ends with one of `modules`, or lies inside one.

    >>> is_part("decoder.lm_head.weight", "lm_head"), is_part("decoder.my_lm_head", "lm_head")
    (True, False)
    """
    return any(f".{module}." in f".{name}." for module in modules)

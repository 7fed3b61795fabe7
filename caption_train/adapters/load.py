"""Loads a saved adapter onto its base, and refuses one whose tensors do not fit."""

from collections import Counter
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights
from torch import nn

from caption_train.adapters.continuing import WEIGHT_FILES
from caption_train.adapters.patterns import check_patterns
from caption_train.adapters.record import find_adapter
from caption_train.errors import CaptionTrainError
from caption_train.families.base import Family
from caption_train.system.damage import describe_error, explaining_damage, find_damage, refuse_odd_files
from caption_train.system.files import read_json_object


def load_adapter(model: nn.Module, folder: Path | str, family: Family) -> PeftModel:
    """Load a saved adapter (LoRA, IA3, …) onto its base, for captioning.

    Args:
        model: the base model.
        folder: the adapter's folder.
        family: the model's family; its `convert_adapter` converts adapters of other tools.

    Raises:
        CaptionTrainError: the adapter cannot be read, or its tensors do not fit this base.
    """
    config, weights = read_weights(model, folder, family)
    config.inference_mode = True
    with explaining_damage(f"--peft_model {folder}: cannot be loaded on this base", partial(_reason, folder)):
        return fill_adapter(get_peft_model(model, config), weights, folder).eval()


def read_weights(
    model: nn.Module, folder: Path | str, family: Family, flag: str = "--peft_model"
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Read a saved adapter, converted where another tool saved it.

    Args:
        model: the base model.
        folder: the adapter's folder.
        family: the model's family.
        flag: the flag that names the adapter, for messages.

    Returns:
        Its configuration and its tensors, named as PEFT names them for this base.

    Raises:
        CaptionTrainError: the adapter cannot be read.
    """
    folder = find_adapter(folder)
    what = f"{flag} {folder}"
    refuse_odd_files(folder, what)
    with explaining_damage(f"{what}: cannot be loaded on this base", partial(_reason, folder)):
        names = [name for name, _ in model.named_modules()]
        check_patterns(read_json_object(Path(folder) / "adapter_config.json"), names, folder)
        converted = family.convert_adapter(folder, model)
        # Checked here, because PEFT would look for missing weights on the hub.
        if converted is None and not any((Path(folder) / name).is_file() for name in WEIGHT_FILES):
            raise OSError(f"there are no weights: none of {', '.join(WEIGHT_FILES)}")
        return converted or (
            PeftConfig.from_pretrained(str(folder)),
            load_peft_weights(str(folder), device="cpu"),
        )


def fill_adapter(
    model: PeftModel, weights: dict[str, torch.Tensor], folder: Path | str, flag: str = "--peft_model"
) -> PeftModel:
    """Load an adapter's tensors into the modules made for them.

    Args:
        model: the model with an adapter of the same configuration.
        weights: name → tensor.
        folder, flag: where they come from, for messages.

    Raises:
        CaptionTrainError: a tensor is missing, left over or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # PEFT saves copies of the base's embeddings with an adapter on them. They are compared, not loaded.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    copies = {name: weights[name] for name in weights if ".base_layer." in name and name not in expected}
    weights = {name: tensor for name, tensor in weights.items() if name not in copies}
    wrong = sorted(expected.keys() ^ weights.keys()) + _changed(copies, model)
    wrong += [
        name for name in sorted(weights) if expected.get(name, weights[name]).shape != weights[name].shape
    ]
    if wrong:
        raise CaptionTrainError(
            f"{flag} {folder}: does not fit this base: {len(wrong)} of {len(expected)} tensors have no "
            f"counterpart of their shape, such as {wrong[0]}"
        )
    set_peft_model_state_dict(model, weights)
    return model


def _reason(folder: Path | str, error: BaseException) -> str:
    return find_damage(folder) or describe_error(error)


def merge_adapter(model: PeftModel, family: Family) -> nn.Module:
    """Return the base with the adapter's changes in its own weights; the layers of the adapter are gone.

    Raises:
        CaptionTrainError: the adapter is on weights that other modules use too, or of a kind that PEFT cannot
            merge. The model still works as before: what was merged until then does so with what was not.
    """
    family.prepare_merge(model)
    if shared := find_shared(model):
        raise CaptionTrainError(f"an adapter of {', '.join(shared)} cannot be merged: its weights are shared")
    try:
        return model.merge_and_unload()
    except NotImplementedError as error:
        raise CaptionTrainError(
            f"this adapter cannot be merged: {describe_error(error) if str(error) else 'PEFT cannot do it'}"
        ) from error


def find_shared(model: PeftModel) -> list[str]:
    """Return the names of adapted modules that share their weight with another: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    shared = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            layer = module.original_module
        else:
            continue
        if owners[getattr(layer, "weight", None)] > 1:
            shared.append(name)
    return sorted(shared)


def _changed(copies: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    base = dict(model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, copy in copies.items()
        if name not in base or not torch.equal(base[name].float().cpu(), copy.float())
    ]

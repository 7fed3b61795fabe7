"""The LoRA around a model: what it trains, whether all of it is alive, and whose base it belongs to."""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.lora_init import join_start
from caption_train.parts import choose_targets, outside

TRAINABLE_KINDS = (nn.Linear, nn.Conv2d)
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def wrap_with_lora(
    model: nn.Module,
    target_modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool = False,
    dora: bool = False,
    parts: Sequence[str] = (),
    init: str | None = None,
) -> PeftModel:
    """Freeze `model` and put LoRA on each Linear and Conv2d whose name is, or ends in, a target's.

    `parts` are regular expressions of module names; if there are any, only what one matches is trained.
    `init` is `--init_lora_weights`; those that look at weights or data come later, see lora_init.
    Raises UsageError when a target matches nothing; PEFT itself says nothing as long as another one matches.
    """
    check_targets(model, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=choose_targets(model, target_modules, parts),
        exclude_modules=outside(parts),
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    return get_peft_model(model, config)


def check_targets(model: nn.Module, target_modules: Sequence[str]) -> None:
    """Raise UsageError for a target that matches no Linear or Conv2d, with the closest names there are."""
    names = [name for name, module in model.named_modules() if isinstance(module, TRAINABLE_KINDS)]
    endings = sorted({ending for name in names for ending in _endings(name)})
    for target in target_modules:
        if target in endings:
            continue
        close = difflib.get_close_matches(target, endings, 3, cutoff=0.5)
        leaves = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(leaves[:20])}"
        raise UsageError(f"--target_modules {target}: no Linear or Conv2d has this name; {hint}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; packed 4-bit ones count unpacked."""
    counts = [(p.requires_grad, _numel(p)) for p in model.parameters()]
    return sum(n for trained, n in counts if trained), sum(n for _, n in counts)


def copy_lora_b(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every `lora_B`, to compare with after the first step."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}


def find_dead_modules(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the modules whose `lora_B` an optimizer step left as it was in `before`.

    `lora_B` starts at zero and has a gradient at once, `lora_A` only from the second step on.
    """
    now = {name: p for name, p in model.named_parameters() if name in before}
    same = [name for name, value in before.items() if torch.equal(now[name], value)]
    return [name_module(name) for name in same]


def name_module(name: str) -> str:
    """Return the name in the base of the module that a `lora_B` belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_B")[0]


def load_adapter(model: nn.Module, folder: Path | str, family: Family) -> PeftModel:
    """Put a saved adapter (LoRA, IA3, …) on its base, to caption with. A name left over is an error.

    A family may know adapters of other tools by their names and convert them: its `convert_adapter`.
    """
    from peft import PeftConfig, load_peft_weights

    try:
        convert = getattr(family, "convert_adapter", None)
        converted = convert(folder, model) if convert else None
        # PEFT would look for them on the hub.
        if converted is None and not any((Path(folder) / name).is_file() for name in WEIGHT_FILES):
            raise OSError(f"there are no weights: none of {', '.join(WEIGHT_FILES)}")
        config, weights = converted or (
            PeftConfig.from_pretrained(str(folder)),
            load_peft_weights(str(folder), device="cpu"),
        )
        config.inference_mode = True
        return fill_adapter(get_peft_model(model, config), weights, folder).eval()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CaptionTrainError(f"--peft_model {folder}: cannot be loaded on this base: {reason}") from error


def fill_adapter(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path | str) -> PeftModel:
    """Load an adapter's tensors into the modules made for them; a name over or missing is an error."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # PEFT saves the base's own embeddings along with an adapter on them; they are checked, not loaded.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    copies = {name: weights[name] for name in weights if ".base_layer." in name and name not in expected}
    weights = {name: tensor for name, tensor in weights.items() if name not in copies}
    wrong = sorted(expected.keys() ^ weights.keys()) + _changed(copies, model)
    wrong += [
        name for name in sorted(weights) if expected.get(name, weights[name]).shape != weights[name].shape
    ]
    if wrong:
        raise CaptionTrainError(
            f"--peft_model {folder}: does not fit this base: {len(wrong)} of {len(expected)} tensors have no "
            f"counterpart of their shape, such as {wrong[0]}"
        )
    set_peft_model_state_dict(model, weights)
    return model


def find_shared(model: PeftModel) -> list[str]:
    """Return the names of adapted modules whose weight another module has too: merging would change both."""
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


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter that fits the base as it was before training, whatever the LoRA started from.

    weights: the trained ones, where the model itself holds only a part of each.
    """
    if getattr(model, "lora_start", None) is None:
        # Without this PEFT asks the hub whether the vocabulary grew.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        return
    from peft import get_peft_model_state_dict

    weights, config = join_start(model, get_peft_model_state_dict(model, save_embedding_layers=False))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.cpu() for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))


def _changed(copies: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    base = dict(model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, copy in copies.items()
        if name not in base or not torch.equal(base[name].float().cpu(), copy.float())
    ]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _numel(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()

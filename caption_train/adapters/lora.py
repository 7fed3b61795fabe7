"""Puts LoRA around a model, counts its parameters and saves it; record.py shows the saved folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from caption_train.adapters.initialization import join_start
from caption_train.adapters.targets import check_targets, choose_targets, outside


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
    """Freeze `model` and put LoRA on each Linear and Conv2d whose name is, or ends with, a target.

    Args:
        model: the base model.
        target_modules: names, or ends of names, of modules.
        rank: rank of the LoRA.
        alpha: the LoRA's output is scaled by alpha / rank, or by alpha / √rank with `rslora`.
        dropout: probability of dropping an input of the LoRA.
        rslora: see `alpha`.
        dora: whether to use DoRA.
        parts: regular expressions of module names; if there are any, only matching modules are trained.
        init: the value of `--init_lora_weights`. Initialization from weights or data follows later, in
            initialization.py.

    Raises:
        UsageError: a target matches no module. PEFT says nothing as long as another target matches.
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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; packed 4-bit ones count as unpacked."""
    counts = [(p.requires_grad, _numel(p)) for p in model.parameters()]
    return sum(n for trained, n in counts if trained), sum(n for _, n in counts)


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter for the unchanged base, however the LoRA was initialized.

    Args:
        model: the model with LoRA.
        folder: the folder to write to.
        weights: the trained weights, if the model itself holds only a shard of each.
    """
    if getattr(model, "lora_start", None) is None:
        for config in model.peft_config.values():
            _sort_sets(config)
        # save_embedding_layers=False: otherwise PEFT asks the hub whether the vocabulary has grown.
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
    _sort_sets(config)
    config.save_pretrained(str(folder))


def _sort_sets(config: PeftConfig) -> None:
    """Make lists of a configuration's sets: the order of a set of strings differs from run to run."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def _numel(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()

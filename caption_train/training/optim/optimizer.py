"""Makes the optimizer and its learning-rate schedule."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.state import PartialState
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from caption_train.adapters.targets import find_part
from caption_train.config.training import TrainOptions
from caption_train.config.values import read_part_rates
from caption_train.errors import UsageError
from caption_train.training.optim.state_size import find_embeddings

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
FLORA_BETA1 = 0.9
"""Flora's momentum, from the paper. The default of flora-opt is none; `rank` would then have no effect."""


def make_optimizer(
    options: TrainOptions, model: torch.nn.Module, parts: Mapping[str, str] | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer of the model's trainable parameters.

    parts: part → pattern of module names, which `--part_learning_rates` needs.

    Flora's `scale_parameter` is off. It multiplies the learning rate by the size of the weight, which is zero
    for a new `lora_B`. Without it, `--learning_rate` means about the same as for AdamW.
    """
    groups = group_parameters(options, model, parts or {})
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer_name == "AdamW":
        # Fused: one kernel per weight, without temporaries of its size; six times as fast on a CPU.
        fused = PartialState().device.type in FUSED_DEVICES
        return torch.optim.AdamW(groups, fused=fused or None, **settings)
    if options.optimizer_name == "Flora":
        from caption_train.training.optim.flora import Flora

        return Flora(groups, beta1=FLORA_BETA1, scale_parameter=False, **settings)
    import bitsandbytes

    return getattr(bitsandbytes.optim, options.optimizer_name)(groups, **settings)


def group_parameters(
    options: TrainOptions, model: torch.nn.Module, parts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one learning rate and, for Flora, one rank.

    The rate of a `lora_B` is multiplied by `--lora_plus_ratio` (LoRA+, arXiv 2402.12354). The momentum of an
    embedding is not compressed, as in Flora's paper. Each part with a rate of its own has groups of its own,
    behind those at `--learning_rate`, so that another rate does not change which groups there are.

    Raises:
        UsageError: nothing is trained in a part that has a rate of its own.
    """
    is_flora = options.optimizer_name == "Flora"
    own_rates = read_part_rates(options.part_learning_rates)
    patterns = {part: parts[part] for part in own_rates}
    embeddings = find_embeddings(model)
    groups: dict[tuple, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_fast = options.lora_plus_ratio is not None and "lora_B" in name
            part = find_part(name, patterns)
            rate = own_rates.get(part, options.learning_rate) * (options.lora_plus_ratio if is_fast else 1)
            rank = options.optimizer_rank if is_flora and p not in embeddings else None
            groups.setdefault((part, rate, rank), []).append(p)
    trained = {part for part, _, _ in groups}
    if idle := [part for part in own_rates if part not in trained]:
        raise UsageError(f"--part_learning_rates: nothing is trained in {', '.join(idle)}; drop its rate")
    return [
        {"params": parameters, "lr": rate, **({"rank": rank} if is_flora else {})}
        for (_, rate, rank), parameters in sorted(groups.items(), key=lambda group: group[0][0] is not None)
    ]


def make_lr_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> LRScheduler:
    """Make the learning-rate schedule.

    The rate rises during `--warmup_steps`; OneCycle without them rises during 30 % of the steps, torch's
    default.

    Args:
        options: the options of the run.
        optimizer: its rates are the highest ones of the schedule.
        total_steps: optimizer steps of the whole run.
    """
    if options.scheduler == "OneCycle":
        # In torch, the rise ends at step `share * total_steps - 1`, and at least one step must follow.
        total_steps = max(total_steps, options.warmup_steps + 2)
        share = (options.warmup_steps + 1) / total_steps if options.warmup_steps else 0.3
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps, pct_start=share, cycle_momentum=False)
    from transformers import get_scheduler

    name = "constant_with_warmup" if options.scheduler == "constant" else options.scheduler
    return get_scheduler(name, optimizer, options.warmup_steps, total_steps)

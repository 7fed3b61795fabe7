"""Makes the optimizer and its learning-rate schedule."""

from typing import Any

import torch
from accelerate.state import PartialState
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from caption_train.config.training import TrainOptions
from caption_train.training.optim.state_size import find_embeddings

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
FLORA_BETA1 = 0.9
"""Momentum of Flora, the paper's. Upstream's default is none, with which `rank` would do nothing."""


def make_optimizer(options: TrainOptions, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of the model's trainable parameters.

    Flora's `scale_parameter` is off: it multiplies the rate by the weight's size, which for a new `lora_B`
    is zero; `--learning_rate` then means about what it means to AdamW.
    """
    groups = group_parameters(options, model)
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer_name == "AdamW":
        # One kernel for a whole weight: no temporaries as large as it, and on a CPU six times as fast.
        fused = PartialState().device.type in FUSED_DEVICES
        return torch.optim.AdamW(groups, fused=fused or None, **settings)
    if options.optimizer_name == "Flora":
        from caption_train.training.optim.flora import Flora

        return Flora(groups, beta1=FLORA_BETA1, scale_parameter=False, **settings)
    import bitsandbytes

    return getattr(bitsandbytes.optim, options.optimizer_name)(groups, **settings)


def group_parameters(options: TrainOptions, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters as groups of one learning rate and, for Flora, one rank.

    A `lora_B` learns `--lora_plus_ratio` times as fast (LoRA+, arXiv 2402.12354). An embedding's momentum is
    left whole, as in Flora's paper.
    """
    is_flora = options.optimizer_name == "Flora"
    embeddings = find_embeddings(model)
    groups: dict[tuple, list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_fast = options.lora_plus_ratio is not None and "lora_B" in name
            rate = options.learning_rate * (options.lora_plus_ratio if is_fast else 1)
            rank = options.optimizer_rank if is_flora and p not in embeddings else None
            groups.setdefault((rate, rank), []).append(p)
    return [
        {"params": parameters, "lr": rate, **({"rank": rank} if is_flora else {})}
        for (rate, rank), parameters in groups.items()
    ]


def make_lr_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> LRScheduler:
    """Make the schedule over `total_steps` optimizer steps.

    The rate rises for `--warmup_steps`; OneCycle without them rises for torch's 30 % of the steps.
    """
    if options.scheduler == "OneCycle":
        # torch ends the rise at step `share * total_steps - 1` and divides by what is left after it.
        total_steps = max(total_steps, options.warmup_steps + 2)
        share = (options.warmup_steps + 1) / total_steps if options.warmup_steps else 0.3
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps, pct_start=share, cycle_momentum=False)
    from transformers import get_scheduler

    name = "constant_with_warmup" if options.scheduler == "constant" else options.scheduler
    return get_scheduler(name, optimizer, options.warmup_steps, total_steps)

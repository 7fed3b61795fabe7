"""Takes one Flora step for one weight in little memory: Adafactor with a randomly projected momentum.

Formulas, seeds and rounding are those of the package flora-opt, bit for bit
(tests/training/optim/test_flora_step.py). flora-opt holds up to five copies of a weight during its step; here
there are two, and the gradient.
"""

import math
from typing import Any

import torch
from flora_opt.optimizers.torch.flora import next_seed, split_seed, stable_randn


def step_weight(
    p: torch.Tensor, held: list[torch.Tensor], state: dict[str, Any], group: dict[str, Any], compresses: bool
) -> None:
    """Step one weight.

    Args:
        p: the weight.
        held: a list with the gradient, which is removed from it and freed during the step.
        state: the optimizer's state of `p`, with its "seed".
        group: the parameter group of `p`.
        compresses: whether the momentum is held at the group's rank.
    """
    gradient = held.pop().float()
    if "step" not in state:
        _start(state, gradient, group, compresses)
    state["step"] += 1
    weight = p.float()
    state["RMS"] = _rms(weight)
    update = _scale(gradient, state, group)
    del gradient
    if group["beta1"]:
        (_move_compressed if compresses else _move)(update, state, group)
    update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(group["lr"])
    if group["weight_decay"]:
        weight.add_(weight, alpha=-group["weight_decay"] * group["lr"])
    weight.sub_(update)
    if weight is not p:
        p.copy_(weight)


def _start(state: dict[str, Any], gradient: torch.Tensor, group: dict[str, Any], compresses: bool) -> None:
    state["step"], shape, rank = 0, gradient.shape, group["rank"]
    if compresses:
        shape = (rank, shape[1]) if shape[0] < shape[1] else (shape[0], rank)
    if group["beta1"]:
        state["exp_avg"] = gradient.new_zeros(shape)
    if gradient.dim() == 2:
        state["exp_avg_sq_row"] = gradient.new_zeros(gradient.shape[0])
        state["exp_avg_sq_col"] = gradient.new_zeros(gradient.shape[1])
    else:
        state["exp_avg_sq"] = torch.zeros_like(gradient)


def _scale(gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
    """Return the gradient divided by the root of its running second moment, factored for a matrix."""
    decay = 1.0 - math.pow(state["step"], group["decay_rate"])
    square = gradient.square().add_(group["eps"][0])
    if gradient.dim() != 2:
        state["exp_avg_sq"].mul_(decay).add_(square, alpha=1.0 - decay)
        return torch.rsqrt(state["exp_avg_sq"], out=square).mul_(gradient)
    rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    rows.mul_(decay).add_(square.mean(dim=-1), alpha=1.0 - decay)
    columns.mul_(decay).add_(square.mean(dim=-2), alpha=1.0 - decay)
    by_row = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return torch.mul(by_row, columns.unsqueeze(-2).rsqrt(), out=square).mul_(gradient)


def _move(update: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    momentum, beta = state["exp_avg"], group["beta1"]
    update.mul_(1 - beta)
    momentum.mul_(beta).add_(update)
    update.copy_(momentum)


def _move_compressed(update: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Mix the update with the decompressed momentum; every kappa steps, move it to a new projection."""
    momentum, beta = state["exp_avg"], group["beta1"]
    read = _read(state["seed"], momentum, update.shape, group["rank"])
    if state["step"] % group["kappa"] == 0:
        state["seed"] = next_seed(state["seed"])
        momentum.copy_(_compress(state["seed"], read, group["rank"]))
    compressed = _compress(state["seed"], update, group["rank"])
    update.mul_(1 - beta).add_(read.mul_(beta))
    momentum.mul_(beta).add_(compressed.mul_(1 - beta))


def _compress(seed: int, matrix: torch.Tensor, rank: int) -> torch.Tensor:
    projection = _draw(seed, matrix.shape, rank, matrix)
    return projection @ matrix if matrix.shape[0] < matrix.shape[1] else matrix @ projection


def _read(seed: int, compressed: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor:
    projection = _draw(seed, shape, rank, compressed)
    return projection.t() @ compressed if shape[0] < shape[1] else compressed @ projection.t()


def _draw(seed: int, shape: torch.Size, rank: int, like: torch.Tensor) -> torch.Tensor:
    """Return A ~ N(0, 1 / rank) for a matrix's shorter side: [r, m] for the left, [n, r] for the right."""
    left, right = split_seed(seed)
    size, seed = ((rank, shape[0]), left) if shape[0] < shape[1] else ((shape[1], rank), right)
    return stable_randn(size, seed, device=like.device, dtype=like.dtype) / math.sqrt(rank)


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.norm(2) / tensor.numel() ** 0.5

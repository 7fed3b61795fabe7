"""Matrix products with few rows, as a decoder takes them for each token, made faster on a CPU.

For x Wᵀ with a few rows in x, MKL takes up to 2.6 times as long as for (W xᵀ)ᵀ, which is the same product.
Seen with torch 2.13 on an AMD EPYC with AVX2, with one thread and with two, in float32.
`python benchmarks/few_rows.py` shows it on another processor.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

FEWEST_WEIGHTS = 1 << 20
"""A smaller layer fits into the processor's cache and gains nothing."""
VOCABULARY = 1 << 14
"""A layer with as many outputs gives the scores of tokens."""
ROWS = range(3, 6)
ROWS_OF_SCORES = range(2, 65)
"""How many rows are few: with more, the usual way is as fast or faster, or nobody has looked."""


def speed_up_few_rows(model: torch.nn.Module) -> None:
    """Let the linear layers of a model, in eval mode and not quantized, take few rows faster.

    The products are the same up to rounding. Weights that are replaced or changed later count.
    """
    if not torch.backends.mkl.is_available():
        return
    for layer in model.modules():
        # Not of classes made from it, which may do something else.
        if type(layer) is torch.nn.Linear and layer.weight.numel() >= FEWEST_WEIGHTS:
            layer.forward = partial(_multiply, layer)


def multiply_columns(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Return what `layer` makes of `states` [..., D], as a product of its weights with columns."""
    weight, bias = layer.weight, layer.bias
    columns = states.reshape(-1, states.shape[-1]).T
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.T.reshape(*states.shape[:-1], -1).contiguous()


def _multiply(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    few = ROWS if layer.out_features < VOCABULARY else ROWS_OF_SCORES
    rows = states.numel() // max(states.shape[-1], 1)
    if rows in few and states.device.type == "cpu" and states.dtype == layer.weight.dtype == torch.float32:
        return multiply_columns(layer, states)
    return linear(states, layer.weight, layer.bias)

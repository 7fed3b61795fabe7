"""Putting samples of different lengths into one batch so that the padding is never learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

IGNORE_INDEX = -100
"""Label of a position on which no loss is due: the default `ignore_index` of PyTorch's cross-entropy."""


def pad_labels(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Right-pad B rows of token ids with IGNORE_INDEX to [B, T], T the longest row's length."""
    labels = torch.full((len(rows), max(map(len, rows))), IGNORE_INDEX, dtype=torch.long)
    for label, row in zip(labels, rows, strict=True):
        label[: len(row)] = torch.as_tensor(row, dtype=torch.long)
    return labels


def move_batch(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the batch on `device`, pixels and other floating-point tensors in the model's `dtype`.

    What is no tensor stays as it is.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}


def find_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype that `model` takes its pixels in: its first floating-point weight's."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def count_label_tokens(labels: torch.Tensor) -> int:
    """Return how many positions of `labels` [B, T] a loss is due on."""
    return int((labels != IGNORE_INDEX).sum())

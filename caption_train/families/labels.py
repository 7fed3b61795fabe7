"""Pads labels so that no loss is computed on the padding."""

from collections.abc import Sequence

import torch

IGNORE_INDEX = -100
"""Label of a position without a loss: the default `ignore_index` of PyTorch's cross-entropy."""


def pad_labels(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Right-pad B rows of token ids with IGNORE_INDEX to [B, T], where T is the length of the longest row."""
    labels = torch.full((len(rows), max(map(len, rows))), IGNORE_INDEX, dtype=torch.long)
    for label, row in zip(labels, rows, strict=True):
        label[: len(row)] = torch.as_tensor(row, dtype=torch.long)
    return labels


def count_label_tokens(labels: torch.Tensor) -> int:
    """Return how many positions of `labels` [B, T] have a loss."""
    return int((labels != IGNORE_INDEX).sum())

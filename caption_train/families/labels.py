"""Putting samples of different lengths into one batch so that the padding is never learned."""

from collections.abc import Sequence

import torch

IGNORE_INDEX = -100
"""Label of a position on which no loss is due: the default `ignore_index` of PyTorch's cross-entropy."""


def pad_labels(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Right-pad B rows of token ids with IGNORE_INDEX to [B, T], T the longest row's length."""
    labels = torch.full((len(rows), max(map(len, rows))), IGNORE_INDEX, dtype=torch.long)
    for label, row in zip(labels, rows, strict=True):
        label[: len(row)] = torch.as_tensor(row, dtype=torch.long)
    return labels


def count_label_tokens(labels: torch.Tensor) -> int:
    """Return how many positions of `labels` [B, T] a loss is due on."""
    return int((labels != IGNORE_INDEX).sum())

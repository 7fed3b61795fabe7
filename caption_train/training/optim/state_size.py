"""Counts the bytes of gradients and optimizer state from the shapes of the trained parameters."""

from collections.abc import Iterable

from torch import nn

from caption_train.config.training import TrainOptions

SMALLEST_8BIT = 4096
"""bitsandbytes keeps the moments of smaller tensors in 32 bits."""


def find_embeddings(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of word and position embeddings, whose momentum Flora does not compress."""
    return {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}


def count_gradients(options: TrainOptions, trained: Iterable[nn.Parameter]) -> int:
    """Return the bytes of all gradients while they accumulate."""
    rank = options.accumulation_rank if options.accumulation_compression else None
    return sum(4 * _compressed(p, rank) for p in trained)


def count_state(
    options: TrainOptions, trained: Iterable[nn.Parameter], embeddings: set[nn.Parameter] = frozenset()
) -> int:
    """Return the bytes of the optimizer's state; of sharded weights, only this process's shard counts."""
    return sum(_state_bytes(options, p, is_embedding=p in embeddings) for p in trained)


def _state_bytes(options: TrainOptions, p: nn.Parameter, *, is_embedding: bool) -> int:
    p = p.to_local() if hasattr(p, "to_local") else p
    if options.optimizer_name == "Flora":
        second_moment = sum(p.shape) if p.dim() == 2 else p.numel()
        return 4 * (second_moment + _compressed(p, None if is_embedding else options.optimizer_rank))
    if options.optimizer_name.endswith("8bit") and p.numel() >= SMALLEST_8BIT:
        return 2 * (p.numel() + 4 * -(-p.numel() // 256))
    return 8 * p.numel()


def _compressed(p: nn.Parameter, rank: int | None) -> int:
    shrinks = p.dim() == 2 and rank is not None and rank < min(p.shape)
    return rank * max(p.shape) if shrinks else p.numel()

"""Measures how many bytes a forward pass keeps for its backward pass, without keeping them."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from caption_train.training.memory.gradient_checkpointing import find_blocks

RECOMPUTED_GRADIENTS = 0.5
"""Gradients alive in a recomputed block, as a share of its activations; measured by benchmarks/plan.py."""


@dataclass(frozen=True)
class Activations:
    """Bytes that one image keeps for the backward pass.

    Attributes:
        outside: bytes outside of the repeated blocks.
        blocks: bytes inside of each block.
        inputs: bytes of each block's input.
        tensors: bytes of every single tensor, inside or outside of blocks.
    """

    outside: int
    blocks: Sequence[int]
    inputs: Sequence[int]
    tensors: Sequence[int] = ()

    def held(self, *, checkpointing: bool, recomputing: bool = True) -> int:
        """Return the most bytes that are alive at once.

        Args:
            checkpointing: whether the backward pass recomputes blocks (gradient checkpointing).
            recomputing: False for the time before the first block is recomputed.
        """
        if checkpointing:
            largest = max(self.blocks, default=0) if recomputing else 0
            return self.outside + sum(self.inputs) + int((1 + RECOMPUTED_GRADIENTS) * largest)
        return self.outside + sum(self.blocks)


@torch.enable_grad()
def measure_activations(model: nn.Module, batch: Mapping[str, Any]) -> Activations:
    """Run one forward pass of a model in train mode, and count what its backward pass would keep.

    Args:
        model: the model.
        batch: arguments of its forward, with one image.
    """
    counter = _Counter(model)
    handles = []
    for block in find_blocks(model):
        handles.append(block.register_forward_pre_hook(counter.enter, with_kwargs=True))
        handles.append(block.register_forward_hook(counter.leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(counter.keep, _refuse):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return Activations(counter.outside, counter.blocks, counter.inputs, counter.tensors)


@contextmanager
def cast_frozen(model: nn.Module, dtype: torch.dtype, half: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Hold frozen weights in another precision inside the `with` block.

    Args:
        model: the model.
        dtype: precision of the frozen weights.
        half: frozen weights that are held in bfloat16 instead.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    before = [p.data for p in frozen]
    for p in frozen:
        p.data = p.data.to(torch.bfloat16 if p in half else dtype)
    try:
        yield
    finally:
        for p, data in zip(frozen, before, strict=True):
            p.data = data


@contextmanager
def standing_for_packed(model: nn.Module, weights: Collection[nn.Parameter]) -> Iterator[None]:
    """Imitate quantized weights inside the `with` block, to measure activations without quantizing.

    All frozen weights are float32, except `weights`. These multiply in half precision and return the dtype of
    their input, as bitsandbytes does with packed weights.
    """
    linears = [m for m in model.modules() if getattr(m, "weight", None) in weights]
    handles = [m.register_forward_hook(lambda _, inputs, out: out.to(inputs[0].dtype)) for m in linears]
    try:
        with cast_frozen(model, torch.float32, half=weights):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter:
    """Counts every storage once. Weak references keep the identity of a freed one from being used again."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {}
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            self._is_new(tensor)
        self.outside, self.blocks, self.inputs, self.tensors, self.inside = 0, [], [], [], False

    def keep(self, tensor: torch.Tensor) -> None:
        if self._is_new(tensor):
            self.tensors.append(tensor.untyped_storage().nbytes())
            if self.inside:
                self.blocks[-1] += self.tensors[-1]
            else:
                self.outside += self.tensors[-1]

    def enter(self, module: nn.Module, args: tuple, keywords: dict) -> None:
        # Only the first tensor differs from block to block; all blocks share masks and encoder states.
        tensors = (t for t in (*args, *keywords.values()) if isinstance(t, torch.Tensor))
        self.inputs.append(next((t.nbytes for t in tensors), 0))
        self.blocks.append(0)
        self.inside = True

    def leave(self, *_: Any) -> None:
        self.inside = False

    def _is_new(self, tensor: torch.Tensor) -> bool:
        reference = StorageWeakRef(tensor.untyped_storage())
        return self.seen.setdefault(reference.cdata, reference) is reference


def _refuse(_: Any) -> torch.Tensor:
    raise RuntimeError("a measured forward pass has no backward pass")

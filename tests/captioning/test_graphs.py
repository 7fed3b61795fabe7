"""Recorded decoding steps, on the CPU: a recorder of torch's operators stands in for the GPU's graphs."""

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caption_train.captioning.generate import Generation, caption_images
from caption_train.captioning.graphs import DecodeGraphs, can_be_recorded
from caption_train.families import get_family


class Recorder(TorchDispatchMode):
    """Notes operators with the tensors they take and make; `replay` runs them again on these tensors."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read: a GPU's graph forbids that")
        self.operators.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        for operator, args, kwargs, result in self.operators:
            given = {
                leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)
            }
            made = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                # Views and what is changed in place stay where they are.
                if is_tensor(old) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


def record(work):
    """Record, and undo what recording did, for a GPU does nothing then."""
    recorder = Recorder()
    with recorder:
        result = work()
    changed = {
        id(a): a
        for operator, args, _, _ in recorder.operators
        for a in args[:1]
        if operator._schema.is_mutable
    }
    lengths = [tensor for tensor in changed.values() if tensor.ndim == 0]
    for tensor in lengths:
        tensor.sub_(1)
    return recorder.replay, result

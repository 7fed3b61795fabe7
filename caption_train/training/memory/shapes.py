"""Runs a model's forward without its weights: tensors have shapes and types, and no data.

Only what depends on weights or pixels is without data. Token ids, masks and grids stay as they are, since a
forward asks them for values: where the image tokens stand, how many patches an image has.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NEEDS_DATA = (
    *(DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException),
    *(RuntimeError, NotImplementedError, TypeError, ValueError),
)
"""What a forward raises that cannot run without data: one that chooses experts by what it computed, say."""
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class ShapesOnly(TorchDispatchMode):
    """While active, what is computed from a tensor without data is one too.

    Autocast and the choice of kernels are those of a CPU.

    >>> linear, shapes = torch.nn.Linear(4, 2, device="meta"), ShapesOnly()
    >>> shapes.hollow(linear)
    >>> with shapes:
    ...     output = linear(torch.ones(3, 4))
    >>> output.shape, output.device.type
    (torch.Size([3, 2]), 'cpu')
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def hollow(self, model: nn.Module) -> None:
        """Replace a model's parameters and buffers by ones without data; tied ones stay tied."""
        done: dict[torch.Tensor, torch.Tensor] = {}

        def replace(tensor: torch.Tensor) -> torch.Tensor:
            if tensor not in done:
                empty = self._empty(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                done[tensor] = (
                    nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
                )
            return done[tensor]

        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: replace(t) for name, t in tensors.items() if t is not None})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(map(_is_empty, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func in INDEXED:
            # How many elements a mask chooses is known from the mask, which has data.
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        args, kwargs = tree_map_only(torch.Tensor, self._empty, (args, kwargs))
        with self.mode:
            return func(*args, **kwargs)

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return FakeTensor(self.mode, tensor.to("meta"), torch.device("cpu"))


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (isinstance(value, FakeTensor) or value.is_meta)


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if index is None or index.dtype != torch.bool or _is_empty(index):
        return (index,)
    return index.nonzero(as_tuple=True)

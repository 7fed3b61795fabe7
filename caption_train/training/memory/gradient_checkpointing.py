"""Enables gradient checkpointing for every repeated block: activations are recomputed, not kept."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def enable_checkpointing(model: nn.Module) -> None:
    """Keep only the inputs of every repeated block for the backward pass. Call it when adapters are in place.

    transformers does this for layers of its own class. Some vision towers have none, and hold most of the
    activations, so their blocks are wrapped here. With `use_reentrant=False`, the input of a block needs no
    gradient, so a frozen embedding before it does no harm. Random numbers are restored, so losses stay the
    same.
    """
    with warnings.catch_warnings():
        # Later releases of transformers rename this method; the earlier ones we support lack the new name.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    for block in find_unreached_blocks(model):
        block.forward = partial(_recompute, block, block.forward)


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every block that `enable_checkpointing` makes recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    yield from (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    yield from find_unreached_blocks(model)


def find_unreached_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost elements of module lists that contain no layer transformers itself checkpoints."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for child in module.children():
        if any(isinstance(m, GradientCheckpointingLayer) for m in child.modules()):
            if not isinstance(child, GradientCheckpointingLayer):
                yield from find_unreached_blocks(child)
        elif isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from find_unreached_blocks(child)


def is_recomputed_here(block: nn.Module) -> bool:
    """Return whether `enable_checkpointing` has wrapped the block's forward itself."""
    return isinstance(block.forward, partial) and block.forward.func is _recompute


def _recompute(block: nn.Module, forward: Callable, *args: Any, **keywords: Any) -> Any:
    if not block.training:
        return forward(*args, **keywords)
    return checkpoint(forward, *args, use_reentrant=False, **keywords)

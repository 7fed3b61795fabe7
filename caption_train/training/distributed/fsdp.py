"""Shards all weights over the processes (FSDP 2): each holds a shard, and gathers a block while it runs.

accelerate's configuration decides whether to shard, but torch's `fully_shard` is called here, not by
accelerate 1.15. accelerate silently does not shard on CPUs, so it could not be tested. And under bf16 it
computes the whole forward pass in bf16, where data parallelism keeps losses and norms in float32. Here, both
give the same training.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from caption_train.system.launcher import asks_for
from caption_train.training.distributed.deepspeed import ZeroAccelerator
from caption_train.training.memory.gradient_checkpointing import find_blocks


def parallelism(accelerator: Accelerator) -> str:
    """Return accelerate's name for the kind of parallelism, also where accelerate itself does not know it."""
    if isinstance(accelerator, ZeroAccelerator):
        return DistributedType.DEEPSPEED.value
    if asks_for("FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        return DistributedType.FSDP.value
    return accelerator.distributed_type.value


def find_unsupported() -> list[str]:
    """Return a sentence for each setting in accelerate's FSDP configuration that would be ignored."""
    set_to = {
        name: os.environ.get(f"FSDP_{name}", "").lower()
        for name in ("VERSION", "OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING", "RESHARD_AFTER_FORWARD")
    }
    settings = {
        "fsdp_version: set it to 2": set_to["VERSION"] != "2",
        "fsdp_offload_params: set it to false": set_to["OFFLOAD_PARAMS"] == "true",
        "fsdp_activation_checkpointing: set it to false, use --gradient_checkpointing": (
            set_to["ACTIVATION_CHECKPOINTING"] == "true"
        ),
        "fsdp_reshard_after_forward: set it to true": set_to["RESHARD_AFTER_FORWARD"] == "false",
    }
    return [f"accelerate's configuration, {line}" for line, is_set in settings.items() if is_set]


def shard(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Shard the weights of each repeated block, and those outside of blocks, over all processes.

    Args:
        model: the model, on any device; it is changed in place.
        accelerator: connects the processes.
    """
    model.to(accelerator.device)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        # From rank 0, as DistributedDataParallel does: nobody would notice shards of different weights.
        broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Inner blocks first, as `fully_shard` requires.
    for block in reversed([*find_blocks(model)]):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        # An attribute for torch.compile. transformers would assume that all processes generate in lockstep.
        module.__dict__.pop("_is_fsdp_managed_module", None)
    # Makes the model FSDP's root. `generate` calls blocks outside of the model's forward, and their first
    # would become the root instead.
    model._get_fsdp_state()._lazy_init()
    if accelerator.native_amp:
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    return model


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Optimizer
) -> tuple[torch.nn.Module, Optimizer]:
    """Let accelerate prepare model and optimizer; a sharded model needs no preparation."""
    if isinstance(model, FSDPModule):
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(model, optimizer)


@contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Hold all weights on every process inside the `with` block, to evaluate and caption.

    All processes must enter it. Inside, each may run the model as often as it needs to, or not at all.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
        if modules:
            # Shards again, and resets the recorded order of blocks, by which the backward pass prefetches.
            model.reset_iter_state()


def gather_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, Any] | None:
    """Return a sharded model's full `state_dict` for saving; of a LoRA only the trained weights.

    All processes must call it. Tied weights stay one tensor, as `save_pretrained` needs them. None if the
    model is not sharded.
    """
    if not isinstance(model, FSDPModule):
        return None
    is_lora = hasattr(model, "peft_config")
    weights = {n: t for n, t in model.state_dict(keep_vars=True).items() if t.requires_grad or not is_lora}
    gathered = gather_state(accelerator, {id(tensor): tensor.detach() for tensor in weights.values()})
    return {name: gathered[id(tensor)] for name, tensor in weights.items()}


def gather_state(accelerator: Accelerator, state: Any) -> Any:
    """Return a `state_dict` with full instead of sharded tensors in the main process, None elsewhere.

    All processes must call it. Thus checkpoints are the same whatever the number of processes.
    """
    if isinstance(state, dict):
        return {name: gather_state(accelerator, value) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if accelerator.is_main_process else None


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a `state_dict` with each tensor sharded like its parameter; every process reads it all."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(isinstance(p, DTensor) for p in parameters):
        return state
    for index, values in state["state"].items():
        p = parameters[index]
        for name, value in values.items():
            if isinstance(p, DTensor) and value.shape == p.shape:
                values[name] = distribute_tensor(
                    value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
                )
    return state

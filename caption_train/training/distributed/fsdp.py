"""Every weight cut over the processes (FSDP 2): each holds its part and gathers a block while that runs.

accelerate's configuration says whether; torch's `fully_shard` does it here, not accelerate (1.15), which
leaves CPU processes whole without a word, so that nothing of it could be tested, and under bf16 computes all
of the forward pass in it, where data parallelism keeps losses and norms in float32. Here both train alike.
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
    """Return accelerate's name for how processes share the work, also where it knows nothing of it."""
    if isinstance(accelerator, ZeroAccelerator):
        return DistributedType.DEEPSPEED.value
    if asks_for("FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        return DistributedType.FSDP.value
    return accelerator.distributed_type.value


def find_unsupported() -> list[str]:
    """Return a sentence for each setting of accelerate's FSDP configuration that would not be heeded."""
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
    """Cut the weights of each repeated block, and of what lies outside of them, over all processes."""
    model.to(accelerator.device)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        # As DistributedDataParallel does: parts of different wholes would fit together unnoticed.
        broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in reversed([*find_blocks(model)]):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        # A mark for torch.compile, by which transformers takes it that all processes caption in step.
        module.__dict__.pop("_is_fsdp_managed_module", None)
    # Else the first block that generates a caption, outside of the model's own forward, would take the lead.
    model._get_fsdp_state()._lazy_init()
    if accelerator.native_amp:
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    return model


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Optimizer
) -> tuple[torch.nn.Module, Optimizer]:
    """Hand both to accelerate; a sharded model is ready as it is."""
    if isinstance(model, FSDPModule):
        return model, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(model, optimizer)


@contextmanager
def unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Hold all weights for a while, to evaluate and caption as if nothing were sharded.

    All processes must enter it; inside, each may run the model as often as it has reason to, or not at all.
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
            # Shards again, and forgets in which order blocks ran: by it the next backward pass gathers ahead.
            model.reset_iter_state()


def gather_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, Any] | None:
    """Return a sharded model's `state_dict` to save, of a LoRA what is trained; None if it is not sharded.

    All processes must call it. Tied weights stay one tensor, as `save_pretrained` wants them.
    """
    if not isinstance(model, FSDPModule):
        return None
    is_lora = hasattr(model, "peft_config")
    weights = {n: t for n, t in model.state_dict(keep_vars=True).items() if t.requires_grad or not is_lora}
    gathered = gather_state(accelerator, {id(tensor): tensor.detach() for tensor in weights.values()})
    return {name: gathered[id(tensor)] for name, tensor in weights.items()}


def gather_state(accelerator: Accelerator, state: Any) -> Any:
    """Return a `state_dict` with its sharded tensors whole in the main process, None elsewhere.

    All processes must call it. A checkpoint is thereby the same however the run was launched.
    """
    if isinstance(state, dict):
        return {name: gather_state(accelerator, value) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if accelerator.is_main_process else None


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a `state_dict` with each tensor cut like the parameter it belongs to; every process reads it."""
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

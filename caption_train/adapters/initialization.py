"""Initializes a LoRA from the base's weights or from data: PiSSA, OLoRA, EVA.

PiSSA and OLoRA move a part s B0 A0 of a weight W into the LoRA (s is its scaling) and train
W - s B0 A0 + s B A. What is saved is B A - B0 A0 = [B, -B0] [A; A0], an ordinary LoRA of twice the rank for
the unchanged base. It contains A0 and B0, so that a resumed run subtracts the same part, bit for bit.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel, load_peft_weights
from peft.tuners.lora import Conv2d, LoraLayer
from torch import nn

from caption_train.adapters.load import fill_adapter
from caption_train.config.compatibility import PRINCIPAL
from caption_train.config.training import TrainOptions
from caption_train.data.images import open_items
from caption_train.data.pairs import Pair
from caption_train.errors import UsageError
from caption_train.families.base import Batch
from caption_train.system.damage import explaining_damage
from caption_train.system.devices import model_dtype, move_batch

DATA_IMAGES = 32
"""How many images EVA uses. Their patches are thousands of inputs for every layer."""

OVERSAMPLED = 8
"""Directions computed in addition to those wanted, so that a randomized SVD is close to the exact one."""

FLAG = "--init_lora_weights"


def start_from_weights(model: PeftModel, init: str, device: torch.device) -> None:
    """Initialize each Linear's LoRA with the principal part of its weight, and subtract that from the base.

    The LoRA of a Conv2d is initialized as usual.

    Args:
        model: the model with LoRA.
        init: the value of `--init_lora_weights`.
        device: where to decompose the weights.

    Raises:
        UsageError: a weight has fewer dimensions than the rank, or other modules share it and would lack the
            part.
    """
    for _, layer in _linear_layers(model, init):
        weight = layer.get_base_layer().weight
        rank, scaling = layer.r["default"], layer.scaling["default"]
        lora_a, lora_b = find_principal(weight.to(device, torch.float32), rank, init)
        # The LoRA's output is scaled by s. PiSSA divides by the root of s on each side, OLoRA does not.
        root = scaling**0.5 if init.startswith("pissa") else 1.0
        layer.lora_A["default"].weight.data.copy_(lora_a / root)
        layer.lora_B["default"].weight.data.copy_(lora_b / root)
    model.lora_start = {name: p.detach().clone() for name, p in _lora_tensors(model)}
    _take_away(model, init, device)


def find_principal(weight: torch.Tensor, rank: int, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, in] and B [out, rank], whose product is the principal part of a weight.

    PiSSA (arXiv 2404.02948) takes the largest singular vectors, each times the root of its singular value;
    `_niter_16` finds them by 16 subspace iterations, which is faster. OLoRA (arXiv 2406.01775) takes the
    first columns and rows of a QR decomposition.

    Args:
        weight: [out, in], float32.
        rank: rank of the LoRA.
        init: the value of `--init_lora_weights`.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
        vh = v.T
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def resume_start(
    model: PeftModel, weights: Mapping[str, torch.Tensor], init: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """Subtract the part from the base that a saved adapter contains.

    Args:
        model: the model with LoRA.
        weights: the saved adapter.
        init: the value of `--init_lora_weights`.
        device: where to compute.

    Returns:
        The adapter as it was trained, with half the saved rank.
    """
    trained, model.lora_start = {}, {}
    for name, tensor in weights.items():
        trained[name] = tensor
        if (dim := _joined_dim(name)) is not None:
            now, start = tensor.chunk(2, dim)
            trained[name] = now.contiguous()
            model.lora_start[name] = (start if dim == 0 else -start).contiguous()
    _take_away(model, init, device)
    return trained


def join_start(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """Return tensors and configuration of an ordinary LoRA for the unchanged base; its rank is doubled."""
    config = copy.copy(model.peft_config["default"])
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.inference_mode = True
    joined = {}
    for name, tensor in weights.items():
        joined[name] = tensor
        if (dim := _joined_dim(name)) is not None:
            start = model.lora_start[name].to(tensor)
            joined[name] = torch.cat([tensor, start if dim == 0 else -start], dim)
    return joined, config


@torch.no_grad()
def start_from_inputs(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Initialize each Linear's A with the directions in which its inputs vary most (EVA, arXiv 2410.07170).

    These are the largest right singular vectors of all inputs [N, in]. Between batches, only the singular
    vectors times their values are kept. All layers have the same rank, as in EVA with rho 1.

    Args:
        model: the model with LoRA.
        batches: keyword arguments of its forward, without padding.
    """
    kept: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(partial(_keep_directions, kept, name))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, Conv2d)
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name, scaled in kept.items():
        lora_a = model.get_submodule(name).lora_A["default"].weight
        lora_a[: len(scaled)] = (scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)).to(lora_a)


def _keep_directions(kept: dict[str, torch.Tensor], name: str, layer: Any, inputs: tuple) -> None:
    rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
    rank = layer.r["default"]
    rows = torch.cat([kept[name], rows]) if name in kept else rows
    _, s, v = torch.svd_lowrank(rows, min(rank + OVERSAMPLED, *rows.shape))
    # If the inputs vary in fewer directions than the rank, the other rows of A stay as they are.
    s = s[:rank][s[:rank] > 1e-6 * s[0]]
    kept[name] = s[:, None] * v[:, : len(s)].T


def _take_away(model: PeftModel, init: str, device: torch.device) -> None:
    """Subtract s B0 A0 from each Linear's weight, rounding only once."""
    with torch.no_grad():
        for name, layer in _linear_layers(model, init):
            weight = layer.get_base_layer().weight
            a, b = (model.lora_start[f"{name}.lora_{side}.weight"].to(device, torch.float32) for side in "AB")
            rest = weight.to(device, torch.float32) - layer.scaling["default"] * (b @ a)
            weight.copy_(rest.to(weight))


def _linear_layers(model: PeftModel, init: str) -> Iterator[tuple[str, Any]]:
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[p] = owners.get(p, 0) + 1
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or isinstance(layer, Conv2d):
            continue
        weight, plain = layer.get_base_layer().weight, name.removeprefix("base_model.model.")
        if layer.r["default"] > min(weight.shape):
            raise UsageError(
                f"{FLAG} {init}: --rank {layer.r['default']} is more than {plain} has, whose weight is "
                f"{' × '.join(map(str, weight.shape))}; use --rank {min(weight.shape)} or less"
            )
        if owners[weight] > 1:
            raise UsageError(
                f"{FLAG} {init}: {plain} shares its weight with another module, which must stay as it is; "
                "drop it from --target_modules"
            )
        yield name, layer


def _lora_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, p in model.named_parameters():
        plain = name.replace(".default", "")
        if _joined_dim(plain) is not None:
            yield plain, p


def _joined_dim(name: str) -> int | None:
    return 0 if name.endswith(".lora_A.weight") else 1 if name.endswith(".lora_B.weight") else None


def initialize_lora(
    model: PeftModel, options: TrainOptions, device: torch.device, checkpoint: Path | None
) -> None:
    """Initialize a new LoRA, unless data is needed for it; restore the LoRA of a resumed run.

    Args:
        model: the model with LoRA.
        options: the options of the run.
        device: where to decompose the weights.
        checkpoint: the checkpoint of a resumed run, or None.
    """
    init = options.init_lora_weights
    if checkpoint is None:
        if init in PRINCIPAL:
            start_from_weights(model, init, device)
        return
    with explaining_damage(f"--resume {checkpoint}: the adapter cannot be loaded"):
        weights = load_peft_weights(str(checkpoint), device="cpu")
        if init in PRINCIPAL:
            weights = resume_start(model, weights, init, device)
        fill_adapter(model, weights, checkpoint)


def initialize_from_data(
    model: torch.nn.Module,
    accelerator: Accelerator,
    pairs: Sequence[Pair],
    collate_fn: Callable[[Sequence[dict]], Batch],
) -> None:
    """Initialize a new LoRA from images spread over the dataset, the same images on every process.

    Args:
        model: the prepared model.
        accelerator: the accelerator.
        pairs: the training pairs.
        collate_fn: the family's collator.
    """
    device, model = accelerator.device, accelerator.unwrap_model(model)
    dtype = model_dtype(model)
    chosen = pairs[:: max(len(pairs) // DATA_IMAGES, 1)][:DATA_IMAGES]
    batches = (move_batch(collate_fn([item]), device, dtype) for item in open_items(chosen))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
        start_from_inputs(model, batches)
    if accelerator.num_processes > 1:
        # GPU kernels may round differently on each process, but all need the same LoRA.
        for p in (p for p in model.parameters() if p.requires_grad):
            broadcast(p.data)

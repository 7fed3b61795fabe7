"""A LoRA's first weights in a run: new, from the base, from the data, or those of a checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel, load_peft_weights

from caption_train.captions import Pair
from caption_train.collate import find_dtype, move_batch
from caption_train.combinations import PRINCIPAL
from caption_train.dataset import open_items
from caption_train.families.base import Batch
from caption_train.lora import fill_adapter
from caption_train.lora_init import resume_start, start_from_inputs, start_from_weights
from caption_train.options import TrainOptions

DATA_IMAGES = 32
"""Images that EVA looks at: their patches are thousands of inputs for every layer."""


def start_lora(
    model: PeftModel, options: TrainOptions, device: torch.device, checkpoint: Path | None
) -> None:
    """Give a new LoRA its first weights, as far as data has no part in them; a resumed one those it had."""
    init = options.init_lora_weights
    if checkpoint is None:
        if init in PRINCIPAL:
            start_from_weights(model, init, device)
        return
    weights = load_peft_weights(str(checkpoint), device="cpu")
    if init in PRINCIPAL:
        weights = resume_start(model, weights, init, device)
    fill_adapter(model, weights, checkpoint)


def look_at_data(
    model: torch.nn.Module,
    accelerator: Accelerator,
    pairs: Sequence[Pair],
    collate_fn: Callable[[Sequence[dict]], Batch],
) -> None:
    """Start a new LoRA from images spread over the dataset, the same ones on every process."""
    device, model = accelerator.device, accelerator.unwrap_model(model)
    dtype = find_dtype(model)
    chosen = pairs[:: max(len(pairs) // DATA_IMAGES, 1)][:DATA_IMAGES]
    batches = (move_batch(collate_fn([item]), device, dtype) for item in open_items(chosen))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
        start_from_inputs(model, batches)
    if accelerator.num_processes > 1:
        # A GPU's kernels need not give the same bits twice.
        for p in (p for p in model.parameters() if p.requires_grad):
            broadcast(p.data)

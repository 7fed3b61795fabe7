"""Finds a batch size that fits into memory, by trying the largest step before training."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from caption_train.config.compatibility import SHARDED
from caption_train.config.training import TrainOptions
from caption_train.data.images import open_items
from caption_train.errors import CaptionTrainError, is_out_of_memory
from caption_train.families.base import Batch
from caption_train.features.source import Keeping
from caption_train.system.console import GIB, print_once
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.memory import peak_memory, trim_heap
from caption_train.training.distributed.accelerator import hold_gradients
from caption_train.training.distributed.fsdp import parallelism
from caption_train.training.failures import advise_savers, explain_first_step
from caption_train.training.optim.state_size import count_state, find_embeddings
from caption_train.training.run.data import TrainingData


def fit_batch_size(
    options: TrainOptions,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: Any,
    collate_fn: Callable[[Sequence[dict]], Batch],
    data: TrainingData,
    keeping: Keeping | None = None,
) -> TrainOptions:
    """Try a step with the longest captions and the largest images, and print its peak memory.

    The weights do not change. With `--auto_batch_size`, a batch that does not fit is made smaller and
    accumulation longer until one fits; the effective batch size stays the same.

    Args:
        options: the options of the run.
        accelerator: the accelerator.
        model: the prepared model.
        optimizer: its optimizer.
        collate_fn: the family's collator.
        data: the training data.
        keeping: the features of `--cache_features`; the step encodes all images, one by one, as the first
            epoch does.

    Returns:
        The options with a batch size that fits.

    Raises:
        CaptionTrainError: no batch size fits.
    """
    tried: list[int] = []
    while True:
        tried.append(options.batch_size)
        items = _open_worst(options.batch_size, data)
        fits = _try_step(
            accelerator, model, collate_fn, items, count_room(options, model, optimizer), keeping
        )
        optimizer.zero_grad()
        if not fits and parallelism(accelerator) in SHARDED:
            # No gather here: the other processes are inside the step, waiting for this one's shard.
            raise CaptionTrainError(advise_savers(options, accelerator, tried))
        if all(gather_object([fits])):
            break
        # Only divisors, so that the effective batch size can stay the same.
        smaller = [n for n in range(1, options.batch_size // 2 + 1) if options.batch_size % n == 0]
        if not options.auto_batch_size or not smaller:
            raise CaptionTrainError(advise_savers(options, accelerator, tried))
        times = options.batch_size // smaller[-1]
        accumulated = options.gradient_accumulation_steps * times
        options = replace(options, batch_size=smaller[-1], gradient_accumulation_steps=accumulated)
    trim_heap()
    if len(tried) > 1:
        print_once(
            accelerator,
            f"--auto_batch_size: {options.batch_size} images × {options.gradient_accumulation_steps} "
            f"micro-batches (out of memory with {', '.join(map(str, tried[:-1]))} images)",
        )
    peak = peak_memory(accelerator.device) / GIB
    count = options.batch_size
    print_once(
        accelerator, f"a step of the {count} largest images with the longest captions: peak {peak:.2f} GiB"
    )
    return options


def _try_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    collate_fn: Callable[[Sequence[dict]], Batch],
    items: Sequence[dict],
    state: int,
    keeping: Keeping | None,
) -> bool:
    """Return whether a step fits while `state` bytes are set aside for the optimizer's state."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    model.train()
    inputs = room = loss = None
    try:
        with torch.random.fork_rng(devices), hold_gradients(accelerator, model):
            room = torch.empty(state, dtype=torch.uint8, device=accelerator.device)
            inputs = keeping.make_batch(collate_fn, items) if keeping else collate_fn(items)
            with keeping.encoder.given(inputs) if keeping else nullcontext(inputs) as inputs:
                inputs = move_batch(inputs, accelerator.device, model_dtype(model))
                with explain_first_step(accelerator):
                    loss = model(**inputs).loss.float()
            accelerator.backward(loss)
            room = None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    # Outside of the except block, where the traceback would keep the step's tensors alive.
    if not fits:
        del inputs, room, loss
        gc.collect()
        if devices:
            torch.cuda.empty_cache()
    return fits


def count_room(options: TrainOptions, model: torch.nn.Module, optimizer: Any) -> int:
    """Return the bytes of optimizer state in this process; of a sharded optimizer, only its shard."""
    changed = [p for group in optimizer.param_groups for p in group["params"]]
    return count_state(options, changed, find_embeddings(model))


def _open_worst(count: int, data: TrainingData) -> list[dict]:
    """Return the `count` items that need the most memory; items of a small dataset are repeated."""
    items = list(open_items(data.find_worst(count)))
    if not items:
        raise CaptionTrainError("none of the largest images can be read any more")
    return (items * count)[:count]

"""Starts `--cache_features`: finds where features are kept, and how many there is room for."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from caption_train.config.training import TrainOptions
from caption_train.config.values import parse_bytes
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.features.encoder import KeepingEncoder, fingerprint_encoder
from caption_train.features.source import FeatureSource, Keeping
from caption_train.features.store import FeatureStore, clear_leftovers, make_room, measure_room
from caption_train.system.console import print_once
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.files import cache_folder
from caption_train.training.distributed.ranks import raise_on_all_ranks
from caption_train.training.run.data import TrainingData

KEPT_FREE = 1 << 30
"""Bytes of the disk that are never filled with features."""


def start_keeping(
    options: TrainOptions,
    accelerator: Accelerator,
    model: nn.Module,
    processor: Any,
    family: Family,
    data: TrainingData,
    prompt: str,
) -> Keeping:
    """Make the vision tower keep what it computes, and print how much that will be.

    Args:
        options: `cache_limit`.
        accelerator: the accelerator.
        model: the prepared model.
        processor: the model's processor.
        family: the model's family.
        data: the images.
        prompt: the prompt of the run, to try the tower with.

    Raises:
        UsageError: a part of the vision tower is trained.
        CaptionTrainError: the folder for features cannot be written.
    """
    encoder = KeepingEncoder(accelerator.unwrap_model(model), family)
    _refuse_trained(encoder)
    settings = {
        "images": str(processor.image_processor),
        "settings": family.read_settings(processor),
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "torch": torch.__version__,
    }
    store = FeatureStore(cache_folder("features") / fingerprint_encoder(encoder.modules, settings))
    prompt = data.train[0].prompt or prompt
    size = store.find_size() or _measure(encoder, accelerator, family, processor, prompt)
    digests = sorted({data.digests[pair.image] for pair in data.train + data.validation})
    missing = sum(not store.has(digest) for digest in digests)
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            _prepare_folder(store, options, set(digests), missing * size)
    room = _find_room(store, options)
    print_once(accelerator, _describe(store, len(digests), missing, size, room))
    store.room = room // accelerator.num_processes
    encoder.store = store
    return Keeping(encoder, FeatureSource(store, data.digests))


def _refuse_trained(encoder: KeepingEncoder) -> None:
    for module in encoder.modules:
        trained = next((name for name, p in module.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise UsageError(
                f"--cache_features keeps what a frozen vision tower makes of images, but {trained} is "
                "trained: --target_modules or --init_adapter reaches it; drop --cache_features"
            )


def _measure(
    encoder: KeepingEncoder, accelerator: Accelerator, family: Family, processor: Any, prompt: str
) -> int:
    """Return how many bytes the features of an image have: the tower is tried on a blank one."""
    batch = family.encode(processor, [Image.new("RGB", (32, 32))], [prompt])
    with accelerator.autocast():
        batch = move_batch(batch, accelerator.device, model_dtype(encoder.owner))
        return encoder.encode_one(batch, family.image_inputs).nbytes


def _prepare_folder(store: FeatureStore, options: TrainOptions, digests: set[str], needed: int) -> None:
    """Make the folder, and room in those of other runs if `--cache_limit` asks for it."""
    root = store.folder.parent
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CaptionTrainError(
            f"--cache_features: {store.folder} cannot be made: {error.strerror}; $XDG_CACHE_HOME moves it"
        ) from error
    clear_leftovers(store.folder)
    if options.cache_limit is not None:
        make_room(root, parse_bytes(options.cache_limit), needed, lambda path: _is_own(path, store, digests))


def _is_own(path: Path, store: FeatureStore, digests: set[str]) -> bool:
    return path.is_relative_to(store.folder) and path.stem in digests


def _find_room(store: FeatureStore, options: TrainOptions) -> int:
    """Return how many bytes of features may still be added."""
    found = measure_room(store.folder.parent)
    left = max(0, found.free - KEPT_FREE)
    if options.cache_limit is None:
        return left // 2
    return max(0, min(left, parse_bytes(options.cache_limit) - found.used))


def _describe(store: FeatureStore, count: int, missing: int, size: int, room: int) -> str:
    line = f"--cache_features: {count * size / 1e9:.2f} GB for {count:,} images in {store.folder}"
    if missing < count:
        line += f", {count - missing:,} of them from an earlier run"
    if missing * size > room:
        line += (
            f"; there is room for {room // size:,} of the other {missing:,}: the rest is computed each epoch "
            "(--cache_limit)"
        )
    return line

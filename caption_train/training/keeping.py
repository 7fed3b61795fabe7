"""Starts `--cache_features` in every process of a run."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from caption_train.config.training import TrainOptions
from caption_train.config.values import parse_bytes
from caption_train.errors import UsageError
from caption_train.families.base import Family
from caption_train.features.encoder import KeepingEncoder
from caption_train.features.opening import Opening
from caption_train.features.source import Keeping
from caption_train.system.console import print_once
from caption_train.training.distributed.ranks import raise_on_all_ranks
from caption_train.training.run.data import TrainingData


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
    images = {pair.image for pair in data.train + data.validation}
    opening = Opening(
        accelerator.unwrap_model(model),
        family,
        processor,
        {image: data.digests[image] for image in images},
        data.train[0].prompt or prompt,
        precision=accelerator.mixed_precision,
        around=accelerator.autocast(),
    )
    _refuse_trained(opening.encoder)
    limit = None if options.cache_limit is None else parse_bytes(options.cache_limit)
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            opening.prepare(limit)
    keeping, line = opening.start(limit, accelerator.num_processes)
    print_once(accelerator, line)
    return keeping


def _refuse_trained(encoder: KeepingEncoder) -> None:
    for module in encoder.modules:
        trained = next((name for name, p in module.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise UsageError(
                f"--cache_features keeps what a frozen vision tower makes of images, but {trained} is "
                "trained: --target_modules or --init_adapter reaches it; drop --cache_features"
            )

"""Starts `--cache_features` in every process of a run."""

from functools import partial
from itertools import chain
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
        UsageError: a part of the vision tower is trained, or this kind of model cannot be given features.
        CaptionTrainError: the folder for features cannot be written.
    """
    opening = Opening(
        accelerator.unwrap_model(model),
        family,
        processor,
        data.digests,
        data.train[0].prompt or prompt,
        precision=accelerator.mixed_precision,
        limit=options.cache_limit and parse_bytes(options.cache_limit),
        around=accelerator.autocast,
    )
    _refuse_trained(opening.encoder)
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            opening.prepare()
    keeping, line = opening.start(accelerator.num_processes, partial(print_once, accelerator))
    print_once(accelerator, line)
    return keeping


def _refuse_trained(encoder: KeepingEncoder) -> None:
    tower = encoder.tower
    named = chain(tower.parameters.items(), *(module.named_parameters() for module in tower.modules))
    trained = next((name for name, parameter in named if parameter.requires_grad), None)
    if trained is not None:
        raise UsageError(
            f"--cache_features keeps what a frozen vision tower makes of images, but {trained} is "
            "trained: --target_modules or --init_adapter reaches it; drop --cache_features"
        )

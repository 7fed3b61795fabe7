"""How long captions and images are in tokens, for `--group_by_length`, and what that saves."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from caption_train.config.training import TrainOptions
from caption_train.families.base import Family
from caption_train.training.run.batch_plan import BatchPlan
from caption_train.training.run.data import TrainingData

STEP, LARGEST = 64, 2048
"""Images are told apart by their side in steps of so many pixels, up to the largest."""


def measure_lengths(
    family: Family, processor: Any, data: TrainingData, options: TrainOptions
) -> Sequence[int]:
    """Return how many tokens the model reads of each training pair, about.

    Args:
        family: the model's family.
        processor: the model's processor.
        data: the pairs; an image counts where it takes more tokens the larger it is.
        options: `max_length`.
    """

    @cache
    def count(text: str) -> int:
        return len(family.tokenize_caption(processor, text))

    @cache
    def weigh(side: int) -> int:
        return round(family.weigh_image(processor, (side, side)))

    lengths = array("L")
    train = data.train
    for caption, prompt, pixels in zip(train.captions(), train.prompts(), train.pixels.tolist(), strict=True):
        length = min(count(caption) + 1, options.max_length) + count(prompt or "")
        if family.features_vary:
            side = math.isqrt(pixels)
            length += weigh(min(max(side // STEP, 1) * STEP, LARGEST))
        lengths.append(length)
    return lengths


def describe_padding(plan: BatchPlan) -> str:
    """Return a line on how much of an epoch's batches is padding, and how much it would be otherwise."""
    grouped, plain = (p.measure_padding(plan.lengths) for p in (plan, replace(plan, lengths=None)))
    return f"--group_by_length: {grouped:.1%} of the tokens in batches are padding, {plain:.1%} without it"

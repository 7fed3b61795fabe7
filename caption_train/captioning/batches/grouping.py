"""Orders captions so that batches hold prompts and images of similar length: `--group_by_length`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from caption_train.captioning.prompts import Task
from caption_train.data.images import read_size
from caption_train.families.base import Family

T = TypeVar("T")
WINDOW = 16
"""Batches that are filled together. Captions come in order, so a kill loses as many at most."""
STEP, LARGEST = 64, 2048
"""Images are told apart by their side in steps of so many pixels, up to the largest."""


def order_by_length(family: Family, processor: Any, tasks: Sequence[Task], batch_size: int) -> list[int]:
    """Return the places of tasks in the order in which to caption them, longest first within each window.

    Args:
        family: the model's family.
        processor: the model's processor.
        tasks: the captions to make. Images are asked for their size where larger ones have more tokens.
        batch_size: images in a batch.
    """

    @cache
    def count(prompt: str) -> int:
        return len(family.tokenize_caption(processor, prompt))

    @cache
    def weigh(side: int) -> float:
        return family.weigh_image(processor, (side, side))

    lengths = []
    for task in tasks:
        length = float(count(task.prompt))
        if family.features_vary:
            side = math.isqrt(read_size(task.image))
            length += weigh(min(max(side // STEP, 1) * STEP, LARGEST))
        lengths.append(length)
    window = WINDOW * batch_size
    order: list[int] = []
    for start in range(0, len(tasks), window):
        places = range(start, min(start + window, len(tasks)))
        # The longest first: a batch that does not fit into memory shows early.
        order += sorted(places, key=lambda place: -lengths[place])
    return order


def in_first_order(results: Iterable[T], order: Sequence[int]) -> Iterator[T]:
    """Yield results that come in `order` by their places, each as soon as all before it are there.

    >>> list(in_first_order("badc", [1, 0, 3, 2]))
    ['a', 'b', 'c', 'd']
    """
    early: dict[int, T] = {}
    following = 0
    for place, result in zip(order, results, strict=True):
        early[place] = result
        while following in early:
            yield early.pop(following)
            following += 1

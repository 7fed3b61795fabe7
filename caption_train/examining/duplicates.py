"""Finds images that look alike: copies that were resized, saved again or slightly changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caption_train.examining.images import Measured
from caption_train.system.console import ProgressBar

MOST_BITS = 10
"""Bits of 64 in which the hashes of near-duplicates may differ; those of other images differ in about 32."""
MOST_COLOUR = 40
"""How far a colour may be apart, of 255; also how much brighter one may be than the other."""
MOST_PLACES = 0.01
"""Share of an image's places that may differ by more. Hashes of drawings on a plain ground are near."""
_PER_STEP = 256


def find_near_duplicates(images: Sequence[Measured]) -> list[list[int]]:
    """Return groups of places in `images`; in each, all look like its first image.

    Every image is compared with every other by whole rows of numbers: 10,000 take about a second, and never
    more memory than a few numbers for each. Groups do not chain: a film's frames are not one group from its
    first to its last.
    """
    hashes = np.array([image.hash for image in images], dtype=np.uint64)
    colours = np.frombuffer(b"".join(image.colours for image in images), dtype=np.uint8)
    colours = colours.reshape(len(images), -1, 3) if images else colours
    is_open = np.ones(len(images), dtype=bool)
    groups = []
    with ProgressBar(len(images), "looking for near-duplicates", "image", leave=False) as bar:
        for place in range(len(images)):
            if place % _PER_STEP == 0 and place:
                bar.update(count=_PER_STEP)
            if not is_open[place]:
                continue
            near = np.bitwise_count(hashes[place + 1 :] ^ hashes[place]) <= MOST_BITS
            others = np.flatnonzero(near & is_open[place + 1 :]) + place + 1
            if len(others):
                others = others[_are_alike(colours[others], colours[place])]
            if len(others):
                is_open[others] = False
                groups.append([place, *others.tolist()])
    return groups


def _are_alike(colours: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Tell which images have the colours of one image in the same places.

    Args:
        colours: [N, places, 3], as bytes.
        one: [places, 3].
    """
    apart = colours.astype(np.int16) - one
    # One may be brighter than the other as a whole.
    shift = np.median(apart, axis=1, keepdims=True)
    differs = (np.abs(apart - shift) > MOST_COLOUR).any(axis=2)
    return (np.abs(shift) <= MOST_COLOUR).all(axis=(1, 2)) & (differs.mean(axis=1) <= MOST_PLACES)

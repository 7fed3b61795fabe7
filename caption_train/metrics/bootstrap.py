"""Says how sure a score is, and a difference between two models on the same images. Needs numpy.

A score is a function of sums over images, so that a resample is a product of two matrices. Intervals are
percentiles of the bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13); two
models are resampled on the same images (Koehn, EMNLP 2004, W04-3250). p comes from approximate
randomization: each image's results are swapped between the two models or not, at random (Noreen,
Computer-Intensive Methods for Testing Hypotheses, 1989; Riezler and Maxwell, W05-0908).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
_MOST_CELLS = 4_000_000


@dataclass(frozen=True)
class Measure:
    """A metric of one model on N images.

    Attributes:
        rows: [N, K] numbers to sum up, a row an image.
        combine: turns sums [..., K + 1], of which the last is the number of images, into scores [...].
    """

    rows: NDArray[np.float64]
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    def value(self) -> float:
        """Return the score of all images."""
        return float(self.combine(self._full().sum(axis=0)))

    def each(self) -> NDArray[np.float64]:
        """Return the score of each image by itself."""
        return self.combine(self._full())

    def _full(self) -> NDArray[np.float64]:
        return np.hstack([self.rows, np.ones((len(self.rows), 1))])


def mean_of(values: object) -> Measure:
    """Return the measure that is the mean of one number an image."""
    return Measure(
        np.asarray(values, dtype=np.float64).reshape(-1, 1), lambda sums: sums[..., 0] / sums[..., 1]
    )


def find_interval(measure: Measure, samples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of a score, from resampling images.

    Args:
        measure: the score.
        samples: how many resamples are drawn.
        seed: of the draws.
    """
    full = measure._full()
    return _cut_tails(
        np.concatenate([measure.combine(w @ full) for w in _resample(len(full), samples, seed)])
    )


@dataclass(frozen=True)
class Difference:
    """How far a score is above another on the same images: 95 % interval, and p of no difference at all."""

    value: float
    low: float
    high: float
    p: float


def compare(one: Measure, other: Measure, samples: int, seed: int) -> Difference:
    """Return how far `one` is above `other`; both are of the same metric and images, in the same order.

    Args:
        one, other: the two scores.
        samples: how many resamples, and how many swaps, are drawn.
        seed: of the draws.
    """
    ours, theirs = one._full(), other._full()
    drawn = np.concatenate(
        [one.combine(w @ ours) - other.combine(w @ theirs) for w in _resample(len(ours), samples, seed)]
    )
    value, change = one.value() - other.value(), theirs - ours
    rng, reached = np.random.default_rng(seed), 0
    for size in _sizes(len(ours), samples):
        swapped = rng.integers(0, 2, (size, len(ours))).astype(np.float64) @ change
        chance = one.combine(ours.sum(axis=0) + swapped) - other.combine(theirs.sum(axis=0) - swapped)
        # Sums are rounded in another order than the value's.
        reached += int((np.abs(chance) >= abs(value) - 1e-12).sum())
    return Difference(value, *_cut_tails(drawn), (reached + 1) / (samples + 1))


def _resample(images: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield weights [.., N]: how often each image is drawn, N draws with replacement."""
    rng = np.random.default_rng(seed)
    for size in _sizes(images, samples):
        yield rng.multinomial(images, np.full(images, 1 / images), size).astype(np.float64)


def _sizes(images: int, samples: int) -> Iterator[int]:
    most = max(1, _MOST_CELLS // max(images, 1))
    for start in range(0, samples, most):
        yield min(most, samples - start)


def _cut_tails(scores: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(scores, [tail, 100 - tail])
    return float(low), float(high)

"""Samples captions that depend on image and seed alone, not on batch, process or order."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to the logits, from one generator per row, so that the greedy choice is a sample.

    argmax(logits + Gumbel noise) is distributed as softmax(logits): the Gumbel-max trick (Gumbel 1954;
    Maddison et al. 2014, arXiv:1411.0030). transformers' own sampling uses one generator for a whole batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def for_rows(self, rows: Sequence[int]) -> "GumbelNoise":
        """Return what adds noise to these rows alone, where the others are generated apart."""
        noise = GumbelNoise(())
        noise._generators = [self._generators[row] for row in rows]
        return noise

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [B, vocabulary] plus noise; B must be the number of seeds."""
        rows = zip(self._generators, scores, strict=True)
        uniform = torch.stack([torch.rand(row.shape, generator=generator) for generator, row in rows])
        noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(uniform.dtype).tiny)))
        return scores.float() + noise.to(scores.device)


class Temperature(LogitsProcessor):
    """Divides logits by the temperature."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` [B, vocabulary], scaled."""
        return scores / self._temperature


def make_sampler(names: Sequence[str], *, temperature: float, top_p: float, seed: int) -> LogitsProcessorList:
    """Return logits processors with which greedy search samples.

    Args:
        names: the names of a batch's images; row i depends on the seed and `names[i]` alone.
        temperature: logits are divided by it.
        top_p: sample from the likeliest tokens that sum to this probability.
        seed: the seed.
    """
    # surrogatepass: the name of a file need not be UTF-8.
    keys = [f"{seed} {name}".encode(errors="surrogatepass") for name in names]
    seeds = [int.from_bytes(hashlib.sha256(key).digest()[:7]) for key in keys]
    warpers = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([Temperature(temperature), *warpers, GumbelNoise(seeds)])

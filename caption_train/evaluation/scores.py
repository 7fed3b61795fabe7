"""Scores the captions of each model, with intervals, and compares each adapter with the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from caption_train.evaluation.captions import Made
from caption_train.metrics.bootstrap import Difference, Measure, compare, find_interval, mean_of
from caption_train.metrics.coco import ORDER, SMALL, TINY, cider_each, count_bleu, match_each, rouge_l_each
from caption_train.metrics.output_health import REMARKS
from caption_train.metrics.ptb_tokenizer import tokenize
from caption_train.metrics.tags import count_tags

LABELS = {
    "cider": "CIDEr",
    "bleu": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "tag_precision": "tag precision",
    "tag_recall": "tag recall",
    "tag_f1": "tag F1",
    "clip_score": "CLIPScore",
    "words": "words a caption",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "empty": "empty",
    "cut": "cut off",
    "repeats": "looping",
}
"""All metrics, as people read them, in the order of the tables."""
SHARES = ("exact_match", *REMARKS)
EACH = ("cider", "rouge_l", "tag_f1", "clip_score")
"""Metrics that say something of one caption."""


@dataclass(frozen=True)
class Score:
    """A metric of one model. interval: 95 %, None where it means nothing. change: against the base."""

    value: float
    interval: tuple[float, float] | None = None
    change: Difference | None = None


@dataclass
class Scores:
    """What one model reached.

    Attributes:
        of_all: metric → score.
        of_each: metric → a score for each image.
    """

    of_all: dict[str, Score] = field(default_factory=dict)
    of_each: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def score_models(
    captions: Sequence[Sequence[Made]],
    references: Sequence[Sequence[str]],
    *,
    tags: bool,
    clip_scores: Sequence[Sequence[float]] | None,
    resamples: int,
    seed: int,
) -> list[Scores]:
    """Score M models on the same N images; the first is the base.

    Args:
        captions: M lists of N captions.
        references: N lists of references; all empty where there are none.
        tags: whether captions are compared tag by tag too.
        clip_scores: M lists of N CLIPScores, if they were measured.
        resamples: how many resamples intervals and p come from.
        seed: of the resamples.
    """
    measured = [measure(made, references, tags=tags) for made in captions]
    for measures, found in zip(measured, clip_scores or [], strict=False):
        measures["clip_score"] = mean_of(found)
    scored = []
    for number, (made, measures) in enumerate(zip(captions, measured, strict=True)):
        scores = Scores()
        for name, one in measures.items():
            change = compare(one, measured[0][name], resamples, seed) if number else None
            scores.of_all[name] = Score(one.value(), find_interval(one, resamples, seed), change)
            if name in EACH:
                scores.of_each[name] = one.each()
        for name, value in find_distinct([caption.text for caption in made]).items():
            scores.of_all[name] = Score(value)
        scores.of_all = {name: scores.of_all[name] for name in LABELS if name in scores.of_all}
        scored.append(scores)
    return scored


def measure(
    captions: Sequence[Made], references: Sequence[Sequence[str]], *, tags: bool
) -> dict[str, Measure]:
    """Return metric → measure of N captions; without references, only those that need none.

    CIDEr weighs words by all references, in every resample too: a resample is of captions, not of the corpus.
    """
    texts = [caption.text for caption in captions]
    found = {"words": mean_of([len(text.split()) for text in texts])}
    found |= {remark: mean_of([remark in caption.remarks for caption in captions]) for remark in REMARKS}
    if not all(references):
        return found
    tokens = [tokenize(text) for text in texts]
    reference_tokens = [[tokenize(reference) for reference in refs] for refs in references]
    found |= {
        "cider": mean_of(cider_each(tokens, reference_tokens)),
        "bleu": Measure(np.array(count_bleu(tokens, reference_tokens), dtype=np.float64), combine_bleu),
        "rouge_l": mean_of(rouge_l_each(tokens, reference_tokens)),
        "exact_match": mean_of(match_each(texts, references)),
    }
    if tags:
        rows = np.array(count_tags(texts, references), dtype=np.float64)
        found |= {
            "tag_precision": Measure(rows, lambda sums: _divide(sums[..., 0], sums[..., 1])),
            "tag_recall": Measure(rows, lambda sums: _divide(sums[..., 0], sums[..., 2])),
            "tag_f1": Measure(rows, lambda sums: _divide(2 * sums[..., 0], sums[..., 1] + sums[..., 2])),
        }
    return found


def combine_bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return BLEU-4 from sums of `count_bleu`'s rows: [..., 11] → [...]."""
    guesses, correct = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER : 2 + 2 * ORDER]
    score = np.prod((correct + TINY) / (guesses + SMALL), axis=-1) ** (1 / ORDER)
    ratio = (sums[..., 0] + TINY) / (sums[..., 1] + SMALL)
    return np.where(ratio < 1, score * np.exp(1 - 1 / np.minimum(ratio, 1)), score)


def find_distinct(texts: Sequence[str]) -> dict[str, float]:
    """Return the share of different ones among all words, and pairs of words (Li et al., arXiv 1510.03055).

    They have no interval: a resample holds captions twice, which always looks less diverse.
    """
    found = {}
    tokens = [tokenize(text) for text in texts]
    for order in (1, 2):
        counts = Counter(
            tuple(words[start : start + order]) for words in tokens for start in range(len(words) - order + 1)
        )
        found[f"distinct_{order}"] = len(counts) / total if (total := sum(counts.values())) else 0.0
    return found


def find_regressions(
    scored: Mapping[str, Scores], base: Scores, tolerances: Mapping[str, float], lower: Sequence[str]
) -> list[str]:
    """Return what is worse than the base by more than is tolerated: "NAME METRIC 0.41, base 0.52".

    Args:
        scored: the adapters by name.
        base: the base.
        tolerances: metric → how much worse it may be.
        lower: metrics of which less is better.
    """
    found = []
    for name, scores in scored.items():
        for metric, tolerance in tolerances.items():
            ours, theirs = scores.of_all[metric].value, base.of_all[metric].value
            worse = ours - theirs if metric in lower else theirs - ours
            # What is tolerated is written with few digits: 0.52 - 0.5 is a little more than 0.02.
            if worse > tolerance + 1e-9:
                found.append(f"{name} {metric} {ours:.4f}, base {theirs:.4f}")
    return found


def _divide(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(one, other, out=np.zeros_like(one, dtype=np.float64), where=other > 0)

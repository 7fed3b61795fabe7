"""Intervals and p values against what is computed one resample at a time, without matrices."""

import itertools
import random
import statistics

import numpy as np
import pytest

from caption_train.evaluation.scores import combine_bleu
from caption_train.metrics.bootstrap import Measure, compare, find_interval, mean_of
from caption_train.metrics.coco import bleu, cider, cider_each, count_bleu, rouge_l, rouge_l_each
from caption_train.metrics.ptb_tokenizer import tokenize

WORDS = ("a", "red", "dog", "on", "the", "table", "cat")


def make_texts(count, seed):
    chosen = random.Random(seed)
    return [tokenize(" ".join(chosen.choices(WORDS, k=chosen.randint(1, 9)))) for _ in range(count)]


def test_the_mean_of_single_scores_is_the_score_of_all():
    tokens, references = make_texts(20, 1), [[text] for text in make_texts(20, 2)]
    assert statistics.fmean(cider_each(tokens, references)) == pytest.approx(cider(tokens, references))
    assert statistics.fmean(rouge_l_each(tokens, references)) == pytest.approx(rouge_l(tokens, references))


def test_bleu_from_sums_is_bleu_of_the_resample():
    tokens, references = make_texts(12, 3), [[text] for text in make_texts(12, 4)]
    measure = Measure(np.array(count_bleu(tokens, references), dtype=float), combine_bleu)
    assert measure.value() == pytest.approx(bleu(tokens, references), abs=1e-12)
    drawn = random.Random(0).choices(range(12), k=12)
    sums = measure._full()[drawn].sum(axis=0)
    again = bleu([tokens[index] for index in drawn], [references[index] for index in drawn])
    assert float(combine_bleu(sums)) == pytest.approx(again, abs=1e-12)


def test_an_interval_is_where_resampled_means_lie():
    values = np.random.default_rng(5).normal(0.5, 0.2, 60).tolist()
    low, high = find_interval(mean_of(values), 4000, 0)
    chosen = random.Random(6)
    means = sorted(statistics.fmean(chosen.choices(values, k=60)) for _ in range(4000))
    assert low == pytest.approx(means[100], abs=0.01) and high == pytest.approx(means[3900], abs=0.01)
    assert low < statistics.fmean(values) < high
    assert (low, high) == find_interval(mean_of(values), 4000, 0)


def test_the_interval_holds_the_true_mean_about_19_times_in_20():
    rng, hits = np.random.default_rng(7), 0
    for number in range(200):
        low, high = find_interval(mean_of(rng.normal(1.0, 1.0, 50)), 500, number)
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_p_is_the_share_of_all_swaps_that_reach_the_difference():
    one, other = [0.9, 0.4, 0.8, 0.7, 0.9, 0.6, 0.5, 0.9], [0.5, 0.5, 0.6, 0.2, 0.7, 0.6, 0.1, 0.8]
    difference = statistics.fmean(one) - statistics.fmean(other)
    swaps = [
        statistics.fmean(sign * (a - b) for sign, a, b in zip(signs, one, other, strict=True))
        for signs in itertools.product((1, -1), repeat=8)
    ]
    exact = sum(abs(value) >= abs(difference) - 1e-12 for value in swaps) / len(swaps)
    found = compare(mean_of(one), mean_of(other), 20_000, 0)
    assert found.value == pytest.approx(difference)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.low < difference < found.high


def test_the_same_captions_are_no_difference():
    values = [0.1, 0.5, 0.9]
    found = compare(mean_of(values), mean_of(values), 500, 0)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_without_a_difference_p_is_below_a_twentieth_one_time_in_twenty():
    rng = np.random.default_rng(8)
    low = sum(
        compare(mean_of(rng.normal(size=30)), mean_of(rng.normal(size=30)), 300, number).p < 0.05
        for number in range(300)
    )
    assert low / 300 < 0.1


def test_many_images_are_resampled_piece_by_piece():
    values = np.random.default_rng(9).random(50_000)
    low, high = find_interval(mean_of(values), 200, 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 50_000**0.5, rel=0.25)

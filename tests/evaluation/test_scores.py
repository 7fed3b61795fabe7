"""Scores of models side by side, against the metrics computed by themselves."""

import pytest

from caption_train.evaluation.captions import Made
from caption_train.evaluation.scores import (
    LABELS,
    Score,
    Scores,
    find_distinct,
    find_regressions,
    score_models,
)
from caption_train.metrics.coco import score_captions

REFERENCES = [["red, large"], ["green"], ["blue, small, star"], ["white"], ["black, large"], ["grey, dot"]]
GOOD = ["red, large", "green", "blue, small", "white", "black", "grey, dot"]
BAD = ["a photo", "green", "a photo", "", "a photo", "a photo"]


def score(*models, references=REFERENCES, tags=True, clip_scores=None):
    made = [[Made(text, () if text else ("empty",)) for text in texts] for texts in models]
    return score_models(made, references, tags=tags, clip_scores=clip_scores, resamples=500, seed=0)


def test_scores_are_those_of_the_metrics():
    base, tuned = score(BAD, GOOD)
    for texts, scores in ((BAD, base), (GOOD, tuned)):
        expected = score_captions(texts, REFERENCES, ["cider", "bleu", "rouge_l", "exact_match"])
        for name, value in expected.items():
            assert scores.of_all[name].value == pytest.approx(value, abs=1e-12), name
    assert tuned.of_all["tag_precision"].value == 1
    assert tuned.of_all["tag_recall"].value == pytest.approx(9 / 11)
    assert tuned.of_all["tag_f1"].value == pytest.approx(18 / 20)
    assert base.of_all["empty"].value == pytest.approx(1 / 6)
    assert base.of_all["words"].value == pytest.approx(9 / 6)


def test_each_adapter_is_compared_with_the_base():
    base, tuned, same = score(BAD, GOOD, BAD)
    assert all(found.change is None for found in base.of_all.values())
    change = tuned.of_all["rouge_l"].change
    assert change.value == tuned.of_all["rouge_l"].value - base.of_all["rouge_l"].value
    assert 0 < change.low < change.value < change.high and change.p < 0.15
    assert all(found.change.p == 1 for name, found in same.of_all.items() if "distinct" not in name)


def test_each_image_has_its_own_score():
    _, tuned = score(BAD, GOOD)
    assert list(tuned.of_each["tag_f1"]) == pytest.approx([1, 1, 0.8, 1, 2 / 3, 1])
    assert tuned.of_each["rouge_l"][0] == 1


def test_without_references_there_is_what_needs_none():
    (base,) = score(GOOD, references=[[]] * 6, tags=False, clip_scores=[[0.5] * 6])
    assert set(base.of_all) == {"words", "distinct_1", "distinct_2", "empty", "cut", "repeats", "clip_score"}
    assert base.of_all["clip_score"].value == 0.5


def test_every_metric_has_a_label():
    _, tuned = score(BAD, GOOD, clip_scores=[[0.5] * 6] * 2)
    assert list(tuned.of_all) == list(LABELS)


def test_distinct_words_are_counted_over_all_captions():
    assert find_distinct(["a b", "a b c"]) == {"distinct_1": 3 / 5, "distinct_2": 2 / 3}
    assert find_distinct(["", ""]) == {"distinct_1": 0, "distinct_2": 0}


@pytest.mark.parametrize(
    ("metric", "base", "ours", "tolerance", "is_worse"),
    [
        ("cider", 0.52, 0.5, 0.0, True),
        ("cider", 0.52, 0.5, 0.02, False),
        ("cider", 0.5, 0.52, 0.0, False),
        ("empty", 0.0, 0.1, 0.05, True),
        ("empty", 0.1, 0.0, 0.0, False),
    ],
)
def test_a_regression_is_more_than_what_is_tolerated(metric, base, ours, tolerance, is_worse):
    found = find_regressions(
        {"lora": Scores({metric: Score(ours)})},
        Scores({metric: Score(base)}),
        {metric: tolerance},
        ("empty",),
    )
    assert bool(found) is is_worse
    if found:
        assert found == [f"lora {metric} {ours:.4f}, base {base:.4f}"]

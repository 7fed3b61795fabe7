"""Tags are compared one by one, whatever their order and case."""

import pytest

from caption_train.metrics.tags import are_tags, count_tags, split_tags


def test_tags_are_counted_once_in_any_case_and_order():
    assert split_tags(" Solo, long  hair,, SOLO ,") == ["solo", "long hair"]
    assert count_tags(["b, a, c"], [["A, b"]]) == [[2, 3, 2]]


def test_of_several_references_the_one_with_most_in_common_counts():
    assert count_tags(["a, b"], [["c", "a, b, d"]]) == [[2, 2, 3]]


def test_an_empty_caption_has_no_tags():
    assert count_tags([""], [["a, b"]]) == [[0, 0, 2]]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["1girl, solo, long hair", "sky"], True),
        (["A dog, which is brown, runs after the ball that somebody threw", "a cat"], False),
        (["a cat", "a dog", "a, b"], False),
        (["", "  "], False),
    ],
)
def test_lists_of_tags_are_told_from_sentences(captions, expected):
    assert are_tags(captions) is expected

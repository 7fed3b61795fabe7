"""Histograms count every value once, in bars that can be read."""

import xml.etree.ElementTree as xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.reporting.histogram import MOST_BINS, draw_histogram, make_histogram


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_every_value_is_in_one_bar_and_bars_are_few(values):
    histogram = make_histogram(values, "sizes", "pixels")
    assert sum(histogram.counts) == len(values) and len(histogram.counts) <= MOST_BINS + 1
    first, width = histogram.first, histogram.width
    for place, count in enumerate(histogram.counts):
        low, high = first + place * width, first + (place + 1) * width
        is_open = histogram.is_open and place == len(histogram.counts) - 1
        assert count == sum(low <= value and (is_open or value < high) for value in values)
    xml.fromstring(draw_histogram(histogram))


@pytest.mark.parametrize("values", [[0], [7], [5, 5, 5], [0, 1], list(range(31)), [1, 10**6]])
def test_few_and_equal_values_can_be_drawn(values):
    xml.fromstring(draw_histogram(make_histogram(values, "words", "words")))


def test_a_few_far_values_share_the_last_bar():
    histogram = make_histogram([10, 11, 12] * 400 + [9_999], "words", "words")
    assert histogram.is_open and histogram.counts == [400, 400, 400, 1]
    assert histogram.describe_bar(3) == "13 or more" and ">13+<" in draw_histogram(histogram)


def test_the_limit_is_drawn_where_values_reach_it():
    short = make_histogram([1, 2, 3], "tokens", "tokens", limit=257, limit_label="cut after 256")
    long = make_histogram([1, 2, 300], "tokens", "tokens", limit=257, limit_label="cut after 256")
    assert 'class="limit"' not in draw_histogram(short)
    assert 'class="limit"' in draw_histogram(long) and "cut after 256" in draw_histogram(long)


def test_words_are_escaped_and_those_who_cannot_see_it_are_told():
    svg = draw_histogram(make_histogram([1, 1, 2], "<b>words</b>", '"<i>'))
    label = xml.fromstring(svg).get("aria-label")
    assert label == '<b>words</b>: 3 in all, most often 1 "<i>'
    assert "<b>" not in svg and "<i>" not in svg

"""Which captions are worth checking, and what the summary prints."""

import pytest

from caption_train.captioning.summary import CaptioningSummary
from caption_train.families.base import Generated
from caption_train.metrics.output_health import find_remarks, repeats_itself


@pytest.mark.parametrize(
    ("words", "repeats"),
    [
        ("a cat on a mat", False),
        ("a cat on a cat on a cat on a", True),
        ("red red red red red red", True),
        ("a very very very red square", False),
        ("so it goes and so it goes and then it ends", False),
        ("it ends with . . .", False),
        ("one two three one two three one two three", True),
        ("one two three one two three one two", False),
        ("", False),
    ],
)
def test_three_times_the_same_stretch_is_a_repetition(words, repeats):
    assert repeats_itself(words.split()) is repeats


def test_tokens_are_looked_at_where_there_are_no_spaces():
    assert find_remarks(Generated("红色红色红色", [7, 8, 7, 8, 7, 8])) == ["repeats"]


def test_a_caption_may_be_cut_and_empty():
    assert find_remarks(Generated("", [0], finished=False)) == ["cut", "empty"]


def test_the_summary_names_all_unreadable_images_and_a_few_of_the_rest():
    summary = CaptioningSummary(kept=2, unreadable=["bad.png: damaged"], seconds=2.0)
    for number in range(8):
        summary.count(f"{number}.png", ["empty"])
    assert summary.lines() == [
        "8 images captioned in 2.0 s (4.00 images/s), 2 kept as they were (--overwrite captions them again)",
        "8 came out empty: 0.png, 1.png, 2.png, 3.png, 4.png and 3 more",
        "1 image could not be read:",
        "  bad.png: damaged",
    ]


def test_tallies_of_processes_add_up_and_their_times_overlap():
    total = CaptioningSummary(3, 1, ["x"], seconds=2) + CaptioningSummary(4, 0, ["y"], seconds=3)
    assert (total.written, total.kept, total.unreadable, total.seconds) == (7, 1, ["x", "y"], 3)


def test_a_run_that_adds_says_which_captions_an_earlier_one_added_to():
    total = CaptioningSummary(kept=2, adds=True) + CaptioningSummary(written=1, seconds=1.0)
    assert total.lines() == [
        "1 image captioned in 1.0 s (1.00 images/s), 2 added to before, by a run that was cut short"
    ]

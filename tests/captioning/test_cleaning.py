import pytest

from caption_train.captioning.cleaning import clean_caption
from caption_train.config.captioning import CLEANERS, CaptionOptions


@pytest.mark.parametrize(
    ("cleaner", "text", "expected"),
    [
        ("strip_special", "<s>a cat</s><pad><pad>", "a cat"),
        ("strip_special", "a cat</s>, on a mat <|im_end|>.", "a cat, on a mat."),
        ("strip_special", "x < y, <3 and [brackets]", "x < y, <3 and [brackets]"),
        ("one_line", "a cat\n\n  on a mat \n", "a cat on a mat"),
        ("first_sentence", "A cat sits. It sleeps.", "A cat sits."),
        ("first_sentence", 'He says "Stop!" and goes. Then rain.', 'He says "Stop!"'),
        ("first_sentence", "It costs 1.50 at St. Mary. Cheap.", "It costs 1.50 at St. Mary."),
        ("first_sentence", "猫が座っている。寝ている。", "猫が座っている。"),
        ("first_sentence", "no end at all", "no end at all"),
        ("first_sentence", "", ""),
        ("dedupe_tags", "1girl, solo, Solo,  hat, solo,", "1girl, solo, hat"),
        ("dedupe_tags", "one caption", "one caption"),
    ],
)
def test_a_cleaner_takes_away_what_it_says_and_no_more(cleaner, text, expected):
    assert clean_caption(text, [cleaner]) == expected
    assert clean_caption(expected, [cleaner]) == expected
    assert clean_caption(text, []) == text


def test_all_together_do_not_depend_on_their_order():
    text = "<s>a cat,\n a mat, A cat.</s> It sleeps."
    assert clean_caption(text, CLEANERS) == clean_caption(text, CLEANERS[::-1]) == "a cat, a mat, A cat."


def test_an_unknown_cleaner_is_refused():
    assert CaptionOptions(images=["."], clean=["soap"]).check() == [
        "--clean soap: there are strip_special, one_line, first_sentence, dedupe_tags"
    ]

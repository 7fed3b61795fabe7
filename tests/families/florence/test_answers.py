"""Florence-2's answers come out as its original post-processing gives them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from caption_train.families import get_family
from caption_train.families.florence.answers import (
    BANNED_PHRASES,
    PARSERS,
    clean_text,
    dequantize,
    parse_answer,
    quantize,
)
from caption_train.families.florence.drawing import COLORS, draw_answer
from tests.fixtures.florence_legacy import FIXTURES

ROWS = json.loads((FIXTURES / "postprocess.json").read_text())["rows"] if FIXTURES.is_dir() else []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["task"])
def test_answers_are_the_originals(row):
    answer = parse_answer(row["text"], row["task"], tuple(row["image_size_wh"]))
    found = clean_text(row["text"]) if answer is None else answer
    assert found == row["legacy"][row["task"]]


@settings(deadline=None)
@given(st.sampled_from(sorted(PARSERS)), st.text(alphabet="<>/ploysed_0123loc\nca ", max_size=60))
def test_no_text_breaks_the_parser(task, text):
    answer = parse_answer(text, task, (640, 480))
    shapes = [key for key in answer if not key.endswith("labels")]
    for key in shapes:
        labels = answer.get(f"{key}_labels", answer.get("labels"))
        assert len(answer[key]) == len(labels)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.lists(st.integers(0, 999), min_size=2, max_size=12).filter(lambda bins: len(bins) % 2 == 0),
)
def test_quantizing_undoes_dequantizing(size, bins):
    tokens = "".join(f"<loc_{number}>" for number in bins)
    assert quantize(dequantize(bins, size), size) == tokens


def test_points_outside_the_image_become_its_edge():
    assert quantize([-5, 700, 640, 480], (640, 480)) == "<loc_0><loc_999><loc_999><loc_999>"


def test_the_banned_phrases_are_the_originals_72():
    assert len(BANNED_PHRASES) == 72
    assert {"it", "the image", "one another", "lots"} <= BANNED_PHRASES


ANSWERS = {
    "<OD>": "a car<loc_100><loc_100><loc_500><loc_500>",
    "<REGION_PROPOSAL>": "<loc_100><loc_100><loc_500><loc_500>",
    "<OCR_WITH_REGION>": "STOP<loc_100><loc_100><loc_500><loc_100><loc_500><loc_500><loc_100><loc_500>",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "<loc_100><loc_100><loc_500><loc_100><loc_500><loc_500>",
    "<OPEN_VOCABULARY_DETECTION>": "a car<poly><loc_100><loc_100><loc_500><loc_100><loc_500><loc_500></poly>",
}


@pytest.mark.parametrize("task", ANSWERS)
def test_a_drawing_marks_its_shapes_on_a_copy(task):
    image = Image.new("RGB", (200, 100), "white")
    answer = parse_answer(ANSWERS[task], task, image.size)
    drawn = draw_answer(image, answer)
    assert image.getextrema() == ((255, 255),) * 3
    assert drawn.size == image.size
    assert drawn.getpixel((60, 10)) == ImageColor.getrgb(COLORS[0])


def test_letters_beyond_english_are_drawn():
    """A font draws the same empty box for every letter it lacks."""
    images = [
        draw_answer(Image.new("RGB", (200, 100)), {"bboxes": [[9.0, 50.0, 99.0, 90.0]], "labels": [label]})
        for label in ("é", "ß", "Ж", "λ")
    ]
    assert len({image.tobytes() for image in images}) == 4


def test_a_label_at_the_edge_stays_in_the_image():
    image = Image.new("RGB", (120, 60), "white")
    drawn = draw_answer(image, {"bboxes": [[118.0, 1.0, 119.0, 59.0]], "labels": ["a very long label"]})
    assert drawn.getpixel((119, 1)) != (255, 255, 255)


def test_the_family_reads_an_answer_by_its_prompt():
    family = get_family("florence")
    text = ANSWERS["<OD>"]
    assert family.parse_answer(text, "<OD>", (10, 10)) == parse_answer(text, "<OD>", (10, 10))
    prompt = "<CAPTION_TO_PHRASE_GROUNDING>a car and a tree"
    assert family.parse_answer(text, prompt, (10, 10))["labels"] == ["a car"]
    assert family.parse_answer(text, "<CAPTION>", (10, 10)) is None
    assert family.parse_answer(text, "What is this?", (10, 10)) is None

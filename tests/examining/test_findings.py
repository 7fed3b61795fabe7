"""Each finding, in a folder that has it; thresholds; how much of it is shown."""

import json

import pytest
from PIL import Image

from caption_train.examining import examine as examining
from caption_train.examining.captions import find_repeated, find_spelled
from caption_train.examining.findings import HUGE_PIXELS, TINY_SIDE


def test_a_clean_folder_says_that_nothing_was_found(add, examine):
    for number in range(3):
        add(f"{number}.png", f"caption {number}")
    page = examine()
    assert page.text.count('<span class="clean"><strong>0</strong>') == 8
    assert page.text.count('<section aria-labelledby="') == 3  # to look at, counts, lengths


def test_broken_images_are_named_with_the_reason(add, examine):
    add("a.png", "a")
    (add.folder / "b.png").write_bytes(b"")
    (add.folder / "b.txt").write_text("b")
    page = examine()
    assert (page.names("broken"), page.notes("broken")) == (["b.png"], ["empty (0 bytes)"])
    assert "<img" not in page.section("broken")


def test_tiny_images_are_below_the_threshold_that_is_named(add, examine):
    add("a.png", "a", size=(TINY_SIDE, 400))
    add("b.png", "b", size=(400, TINY_SIDE - 1))
    add("c.png", "c", size=(30, 40))
    page = examine()
    assert page.names("tiny") == ["c.png", "b.png"]
    assert page.notes("tiny") == ["30 × 40 pixels", "400 × 255 pixels"]
    assert f"less than {TINY_SIDE} pixels" in page.section("tiny")


def test_huge_images_are_above_the_threshold_that_is_named(add, examine):
    add("a.png", "a")
    side = int(HUGE_PIXELS**0.5)
    Image.new("L", (side + 1, side + 1)).save(add.folder / "b.png")
    page = examine()
    assert page.names("huge") == ["b.png"] and "40 megapixels" in page.section("huge")


def test_odd_shapes_are_beyond_three_to_one(add, examine):
    add("a.png", "a", size=(900, 300))
    add("b.png", "b", size=(300, 903))
    page = examine()
    assert (page.names("odd-shaped"), page.notes("odd-shaped")) == (["b.png"], ["3.0 to 1, 300 × 903 pixels"])


def test_near_duplicates_stand_together_and_say_what_differs(add, examine):
    first = add("a.png", "a harbour", seed=1)
    for name in ("b.png", "c.png"):
        (add.folder / name).write_bytes(first.read_bytes())
    add("d.png", "a bridge", seed=2)
    add("e.jpg", "another bridge", seed=2, quality=60)
    add("f.png", "a hill", seed=3)
    page = examine()
    assert page.names("near-duplicates") == ["a.png", "b.png", "c.png", "d.png", "e.jpg"]
    assert page.titles("near-duplicates") == [
        "3 images, equal to the byte",
        "2 images, alike, with different captions",
    ]


def test_repeated_captions_name_the_caption_and_its_images(add, examine):
    for name, caption in {"a": "a cat", "b": "A  Cat", "c": "a dog", "d": "a cat"}.items():
        add(f"{name}.png", caption)
    page = examine()
    assert page.titles("repeated") == ["3 × “a cat”"]
    assert page.names("repeated") == ["a.png", "b.png", "d.png"]


def test_captions_of_one_image_are_not_repeated_by_it(add, examine, tmp_path):
    add("a.png")
    rows = [{"image": "a.png", "caption": caption} for caption in ("a cat", "A cat")]
    (tmp_path / "more.json").write_text(json.dumps(rows))
    assert not examine(captions=[tmp_path / "more.json"]).names("repeated")


def test_control_tokens_of_any_model_and_of_the_family_are_named(add, examine, tiny_base):
    add("a.png", "a cat</s>")
    add("b.png", "a dog [DEC] runs")
    add("c.png", "a < b, [not a token]")
    assert examine().notes("tokens") == ["</s>", "[DEC]"]
    base = str(tiny_base("florence"))
    add("d.png", "a <loc_12> and <image>")
    notes = examine(family="florence", model_id=base, overwrite=True).notes("tokens")
    assert notes == ["</s>", "[DEC]", "<image>"]


def test_names_of_tokens_are_found_as_they_are_written():
    assert find_spelled(["x <a.b> y", "x <aXb> y", "<a.b><a.b>"], ["<a.b>"]) == {0: ["<a.b>"], 2: ["<a.b>"]}
    assert find_repeated([]) == []


def test_images_without_a_caption_are_shown(add, examine):
    add("a.png", "a")
    add("b.png")
    page = examine()
    assert page.names("captionless") == ["b.png"] and "data-picture" in page.section("captionless")


@pytest.mark.parametrize("family", ["blip", "florence", "moondream", "vlm"])
def test_captions_that_are_cut_are_named_with_how_much(family, add, examine, tiny_base):
    from caption_train.families import get_family

    base = str(tiny_base(family))
    captions = {"a.png": "red", "b.png": "red and green", "c.png": "red and green and blue squares"}
    for name, caption in captions.items():
        add(name, caption)
    chosen = get_family(family)
    processor = chosen.load_text_processor(base)
    counts = {
        name: len(chosen.tokenize_caption(processor, caption)) + chosen.count_frame_tokens(processor)
        for name, caption in captions.items()
    }
    limit = counts["b.png"]
    page = examine(family=family, model_id=base, max_length=limit)
    assert page.names("cut") == ["c.png"]
    assert page.notes("cut") == [f"{counts['c.png']} tokens, {counts['c.png'] - limit} cut"]
    assert f"Training keeps {limit}: 1 caption is cut (33.3 %)" in page.text
    assert f"Tokens of {chosen.title} in a caption" in page.text


def test_without_a_family_nothing_is_said_of_tokens(add, examine):
    add("a.png", "a " * 1000)
    page = examine()
    assert "Tokens of" not in page.text and not page.section("cut")
    assert "Words in a caption" in page.text


def test_tags_are_counted_where_captions_are_lists_of_tags(add, examine):
    for number, caption in enumerate(["Solo, hat", "solo, hat, red", "solo, blue"]):
        add(f"{number}.png", caption)
    text = examine().section("tags")
    shown = [line for line in text.splitlines() if '<span class="tag">' in line]
    assert [line.split(">")[2].split("<")[0] for line in shown] == ["solo", "hat", "blue", "red"]
    assert "4 different tags in 3 captions" in text and "2 of them in one caption only" in text


def test_sentences_have_no_tags(add, examine):
    for number in range(3):
        add(f"{number}.png", f"a long sentence about a picture, with the number {number} in it")
    assert not examine().section("tags")


def test_lists_are_bounded_and_say_so(add, examine, monkeypatch):
    monkeypatch.setattr(examining, "MOST_CARDS", 4)
    monkeypatch.setattr(examining, "MOST_GROUPS", 2)
    monkeypatch.setattr(examining, "MOST_IN_GROUP", 3)
    for number in range(12):
        add(f"{number}.png", f"caption {number % 3}", size=(100, 100))
    page = examine()
    assert len(page.names("tiny")) == 4 and "4 shown of 12." in page.section("tiny")
    assert len(page.names("repeated")) == 6
    assert "6 shown of 12. 2 of 3 groups are shown." in page.section("repeated")
    assert "3 shown of 4" in page.section("repeated")

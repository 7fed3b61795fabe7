"""The embedded default: scenes, the sample set and the tiny bases."""

import sys

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY))

from examples.sample_set import COUNTS, write_sample_set
from examples.scenes import draw_scene, place_things, sample_scene
from examples.styles import RANDOM_STYLES, STYLES, TRIGGER, write_caption

BASES = REPOSITORY / "examples" / "bases"
NAMES = ["florence2-tiny", "blip-tiny", "moondream-tiny", "vlm-tiny"]
SHAPES = REPOSITORY / "examples" / "shapes"
MAX_BASE_BYTES = 8_000_000


def draw_scenes(count, seed=99):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def test_scenes_and_pictures_are_deterministic():
    assert draw_scenes(20) == draw_scenes(20)
    scene = draw_scenes(1)[0]
    first, second = (draw_scene(scene, np.random.default_rng(4)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != draw_scene(scene, np.random.default_rng(5)).tobytes()


def test_the_first_thing_is_drawn_left_of_or_above_the_second():
    rng = np.random.default_rng(0)
    for scene in draw_scenes(300):
        places = place_things(scene, rng)
        assert all(r - 0.01 <= min(x, y) and max(x, y) <= 1.01 - r for x, y, r in places)
        if scene.relation:
            (x1, y1, r1), (x2, y2, r2) = places
            along, across = (x2 - x1, y2 - y1) if scene.relation == "left of" else (y2 - y1, x2 - x1)
            assert along >= r1 + r2
            assert abs(across) < along


@pytest.mark.parametrize("style", ["plain", "detailed", "paragraph", "house"])
def test_every_full_style_tells_all_of_the_scene(style):
    scenes = set(draw_scenes(2000))
    captions = {write_caption(scene, style) for scene in scenes}
    assert len(captions) == len(scenes)


def test_no_pretraining_style_writes_the_house_style():
    rng = np.random.default_rng(1)
    for scene in draw_scenes(200):
        house = write_caption(scene, "house").removeprefix(TRIGGER)
        assert not any(write_caption(scene, style, rng).endswith(house) for style in STYLES)
    assert set(RANDOM_STYLES) < set(STYLES)


def test_the_sample_set_is_rebuilt_byte_for_byte(tmp_path):
    write_sample_set(tmp_path, seed=0)
    for part in COUNTS:
        for path in (tmp_path / part).iterdir():
            committed = SHAPES / part / path.name
            if path.suffix == ".txt":
                assert path.read_text() == committed.read_text()
            else:
                # Pixels, not bytes: another build of Pillow may compress differently.
                difference = np.asarray(Image.open(path), int) - np.asarray(Image.open(committed), int)
                assert np.abs(difference).max() <= 8


def test_every_picture_has_one_caption_and_none_leaks():
    captions = {}
    for part, count in COUNTS.items():
        pictures = [path for path in (SHAPES / part).iterdir() if path.suffix in (".png", ".jpg")]
        assert len(pictures) == count == len(list((SHAPES / part).glob("*.txt")))
        captions[part] = {path.with_suffix(".txt").read_text().strip() for path in pictures}
        assert all(caption.startswith(f"{TRIGGER}, ") for caption in captions[part])
        assert {Image.open(path).size[0] for path in pictures} <= set(range(96, 129))
    assert not captions["train"] & captions["heldout"]


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_small_enough_to_live_in_the_repository(name):
    files = {path.name: path.stat().st_size for path in (BASES / name).iterdir()}
    assert sum(files.values()) <= MAX_BASE_BYTES
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert expected <= set(files)


def load_base(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if name == "florence2-tiny":
        from examples.tiny_florence import FLORENCE as family
    elif name == "moondream-tiny":
        import caption_train.families.moondream.processor  # noqa: F401  (makes it known to the auto classes)
        from examples.pretrain_moondream import MOONDREAM as family
    elif name == "vlm-tiny":
        from examples.tiny_vlm import VLM as family
    else:
        from examples.tiny_blip import BLIP as family
    model = AutoModelForImageTextToText.from_pretrained(BASES / name)
    return family, model, AutoProcessor.from_pretrained(BASES / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_base_captions_unseen_scenes_in_plain_words(name, monkeypatch):
    from examples.pretrain import measure_exact_match

    family, model, processor = load_base(name, monkeypatch)
    assert measure_exact_match(family, model, processor, seed=2024, count=40) >= 0.9


@pytest.mark.parametrize("style", ["detailed", "paragraph"])
@pytest.mark.parametrize("name", ["florence2-tiny", "vlm-tiny"])
def test_a_base_that_is_asked_writes_what_the_prompt_asks_for(name, style, monkeypatch):
    from examples.pretrain import measure_exact_match

    family, model, processor = load_base(name, monkeypatch)
    assert measure_exact_match(family, model, processor, seed=2024, style=style, count=20) >= 0.85


@pytest.mark.parametrize("name", NAMES)
def test_no_base_writes_the_house_style_before_training(name, monkeypatch):
    family, model, processor = load_base(name, monkeypatch)
    paths = sorted((SHAPES / "heldout").glob("*.txt"))[:20]
    images = [Image.open(next(SHAPES.glob(f"heldout/{path.stem}.[pj]*g"))).convert("RGB") for path in paths]
    captions = family.generate(model.eval(), processor, images, "plain")
    assert not {path.read_text().strip() for path in paths} & set(captions)


def test_the_vlm_family_reads_the_vlm_base_as_its_pretraining_did(monkeypatch):
    """The same ids for the prompt, and for a caption up to the token that ends it."""
    from caption_train import load_family
    from caption_train.families.vlm.presets import DEFAULT_PROMPT
    from examples.tiny_vlm import IGNORED, make_batch

    _, _, own = load_base("vlm-tiny", monkeypatch)
    family = load_family("vlm")
    _, processor = family.load(str(BASES / "vlm-tiny"))
    family.configure(processor, {})
    image, caption = Image.new("RGB", (100, 100), "red"), "a red circle on a white background"
    pretrained = make_batch(own, [image], ["plain"], [caption])
    collate_fn = family.make_collator(processor, prompt=DEFAULT_PROMPT, max_length=64)
    trained = collate_fn([{"image": image, "caption": caption}])
    assert trained["input_ids"].tolist() == pretrained["input_ids"].tolist()
    assert (trained["pixel_values"] == pretrained["pixel_values"]).all()
    due = pretrained["labels"][pretrained["labels"] != IGNORED]
    assert own.tokenizer.decode(due) == f"{caption}{own.tokenizer.eos_token}"

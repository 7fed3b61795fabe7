"""Generation with the real families, at random weights: batches change nothing, limits hold."""

from functools import partial

import pytest
from PIL import Image

from caption_train.captioning.batches import encoding
from caption_train.captioning.batches.encoding import ImageFiles
from caption_train.captioning.generate import Generation, caption_images
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.sampling import make_sampler
from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.system.devices import choose_device
from tests.fixtures.photos import draw_photo


@pytest.fixture(scope="module", params=["blip", "florence"])
def loaded(request, tiny_base):
    """A family, its tiny model and its processor."""
    family = get_family(request.param)
    return family, *family.load(str(tiny_base(request.param)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(5)]
    for number, path in enumerate(paths):
        Image.effect_noise((60 + 20 * number, 90), 200).convert("RGB").save(path)
    paths[2].write_bytes(b"damaged")
    return paths


def texts(loaded, images, *, prompt=None, batch_size=4, num_workers=0, **settings):
    family, model, processor = loaded
    prompt = family.facts.default_prompt if prompt is None else prompt
    generation = Generation(prompt, {"do_sample": False, "max_new_tokens": 8, **settings})
    results = caption_images(
        family, model, processor, images, generation, batch_size=batch_size, num_workers=num_workers
    )
    return [r.generated.token_ids if isinstance(r, CaptionResult) else r.reason for r in results]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_caption_is_the_same_alone_and_in_a_batch(loaded, images, beams):
    alone = texts(loaded, images, batch_size=1, num_beams=beams)
    assert texts(loaded, images, batch_size=5, num_beams=beams) == alone
    assert "not an image" in alone[2]


def test_workers_change_nothing(loaded, images):
    assert texts(loaded, images, batch_size=2, num_workers=2) == texts(loaded, images, batch_size=2)


def test_workers_are_left_to_the_machine(loaded, images, capsys, monkeypatch):
    monkeypatch.setattr("caption_train.captioning.batches.size.choose_workers", lambda *_: 1)
    assert texts(loaded, images, batch_size=2, num_workers="auto") == texts(loaded, images, batch_size=2)
    assert "--num_workers auto: 1" in capsys.readouterr().err


def test_sampling_gives_an_image_the_same_caption_in_any_batch(loaded, images):
    make = partial(make_sampler, temperature=8.0, top_p=0.9, seed=3)
    settings = {"do_sample": False, "max_new_tokens": 8, "num_beams": 1}
    generation = Generation(loaded[0].facts.default_prompt, settings, make)
    runs = []
    for size in (1, 4):
        results = caption_images(*loaded, images, generation, batch_size=size)
        runs.append([tuple(r.generated.token_ids) for r in results if isinstance(r, CaptionResult)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


def test_sampling_takes_prompts_of_several_lengths_in_a_batch(loaded, images):
    make = partial(make_sampler, temperature=8.0, top_p=0.9, seed=3)
    generation = Generation("", {"do_sample": False, "max_new_tokens": 8, "num_beams": 1}, make)
    task = "<CAPTION>" if loaded[0].name == "florence" else ""
    prompts, runs = [task or prompt for prompt in ("a", "a photo of", "", "a", "the red")], []
    for size in (1, 5):
        results = caption_images(*loaded, images, generation, batch_size=size, prompts=prompts)
        runs.append([tuple(r.generated.token_ids) for r in results if isinstance(r, CaptionResult)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


def test_a_limit_beyond_the_models_positions_is_the_models(loaded, images):
    prompt = "a photo of" if loaded[0].name == "blip" else None
    (ids,) = texts(loaded, images[:1], prompt=prompt, max_new_tokens=400, num_beams=1)
    assert len(ids) <= 256


def test_unreadable_images_keep_their_place(loaded, images):
    generation = Generation(loaded[0].facts.default_prompt, {"max_new_tokens": 2})
    results = list(caption_images(*loaded, images, generation, batch_size=2))
    assert [result.image for result in results] == images
    assert [isinstance(result, Unreadable) for result in results] == [False, False, True, False, False]
    assert results[4].size == (140, 90)


@pytest.mark.parametrize("turned", [False, True])
def test_a_large_jpeg_may_be_decoded_smaller_but_not_below_what_the_model_reads(loaded, tmp_path, turned):
    family, _, processor = loaded
    side = family.find_side(processor)
    photo, exif = draw_photo(1, (8 * side + 3, 5 * side)), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    photo.save(tmp_path / "a.jpg", quality=95, exif=exif)
    draw_photo(2, (8 * side, 4 * side)).save(tmp_path / "a.png")
    images = [tmp_path / "a.jpg", tmp_path / "a.png"]
    full, draft = (ImageFiles(images, at_least=least) for least in (None, side))
    assert draft[0]["size"] == full[0]["size"] == full[0]["image"].size
    smaller = draft[0]["image"].size
    assert min(smaller) >= side and max(smaller) <= 2 * side + 1
    prompts = [family.facts.default_prompt]
    pixels = [family.encode(processor, [f[0]["image"]], prompts)["pixel_values"] for f in (full, draft)]
    assert 0 < (pixels[0] - pixels[1]).abs().max() < 0.2
    assert draft[1]["image"].tobytes() == full[1]["image"].tobytes()


def test_a_run_decodes_drafts_only_where_it_is_asked_to(loaded, tmp_path, monkeypatch):
    asked, open_measured = [], encoding.open_measured
    monkeypatch.setattr(
        encoding,
        "open_measured",
        lambda path, at_least: asked.append(at_least) or open_measured(path, at_least=at_least),
    )
    draw_photo(1).save(tmp_path / "a.jpg")
    generation = Generation(loaded[0].facts.default_prompt, {"max_new_tokens": 2})
    for draft in (False, True):
        list(caption_images(*loaded, [tmp_path / "a.jpg"], generation, draft=draft))
    assert asked == [loaded[0].find_side(loaded[2])]


def test_a_device_is_found_or_refused():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="--device tpu9"):
        choose_device("tpu9")

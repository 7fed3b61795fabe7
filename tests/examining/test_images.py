"""What is measured of an image is what is shown of it, from one decoding."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from caption_train.data import images
from caption_train.data.images import ImageError, open_image
from caption_train.examining.duplicates import find_near_duplicates
from caption_train.examining.images import GRID, Measured, measure_image, measure_images
from tests.fixtures.photos import draw_photo
from tests.fixtures.sample_set import write_image


def test_the_size_is_the_images_not_that_of_the_smaller_decoding(add):
    path = add("a.jpg", size=(1200, 900))
    measured = measure_image(path)
    assert (measured.width, measured.height, measured.size) == (1200, 900, path.stat().st_size)
    assert (measured.pixels, round(measured.aspect, 3)) == (1_080_000, 1.333)


def test_a_photo_that_was_taken_upright_is_measured_as_it_is_shown(add):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = add("a.jpg", size=(1200, 900), exif=exif)
    measured = measure_image(path)
    assert (measured.width, measured.height) == open_image(path).size == (900, 1200)


def test_what_training_refuses_is_refused_here(add):
    path = add("a.jpg")
    path.write_bytes(path.read_bytes()[:-2000])
    (add.folder / "b.png").write_bytes(b"")
    Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(add.folder / "c.tif")
    for name in ("a.jpg", "b.png", "c.tif"):
        with pytest.raises(ImageError) as refusal:
            open_image(add.folder / name)
        (result,) = measure_images([add.folder / name])
        assert str(result) == str(refusal.value)


def test_every_image_is_decoded_once_for_all_measures_and_for_check_images(add, examine, monkeypatch):
    for number in range(6):
        add(f"{number}.jpg", f"caption {number}", seed=number)
    opened, opening = [], images._opening
    monkeypatch.setattr(images, "_opening", lambda path: (opened.append(path.name), opening(path))[1])
    examine(check_images=True)
    assert sorted(opened) == [f"{number}.jpg" for number in range(6)]


VARIANTS = {
    "saved again": lambda photo, path: photo.save(path.with_suffix(".jpg"), quality=30),
    "halved": lambda photo, path: photo.resize((160, 128)).save(path.with_suffix(".webp")),
    "enlarged": lambda photo, path: photo.resize((900, 720)).save(path.with_suffix(".png")),
    "cropped": lambda photo, path: photo.crop((5, 4, 315, 252)).save(path.with_suffix(".png")),
    "brighter": lambda photo, path: (
        ImageEnhance.Brightness(photo).enhance(1.1).save(path.with_suffix(".png"))
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_changed_copy_is_found_among_others(tmp_path, variant):
    photo = draw_photo(1)
    photo.save(tmp_path / "first.png")
    for seed in range(2, 30):
        draw_photo(seed).save(tmp_path / f"{seed}.png")
    VARIANTS[variant](photo, tmp_path / "z")
    paths = sorted(tmp_path.iterdir())
    (group,) = find_near_duplicates(measure_images(paths))
    assert [paths[place].stem for place in group] == ["first", "z"]


def test_plain_images_are_alike_only_in_the_same_colour(tmp_path):
    colours = ("black", "white", "red", "green", "white")
    paths = [write_image(tmp_path / f"{n}.png", colour, (64, 64)) for n, colour in enumerate(colours)]
    assert find_near_duplicates(measure_images(paths)) == [[1, 4]]


def test_drawings_on_the_same_ground_are_not_alike(tmp_path):
    paths = []
    for number, (colour, place) in enumerate([("red", 20), ("blue", 20), ("red", 60), ("red", 20)]):
        image = Image.new("RGB", (128, 128), "pink")
        image.paste(colour, (place, place, place + 30, place + 30))
        image.paste("purple", (80, 10, 110, 40))
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    assert find_near_duplicates(measure_images(paths)) == [[0, 3]]


def make(hash):
    return Measured(640, 480, 1, hash, bytes(3 * GRID**2))


def test_groups_do_not_chain_from_one_end_of_a_film_to_the_other():
    frames = [make((1 << 6 * number) - 1) for number in range(5)]
    assert find_near_duplicates(frames) == [[0, 1], [2, 3]]


def test_ten_thousand_images_take_seconds():
    import time

    rng = np.random.default_rng(0)
    numbers = [make(int(number)) for number in rng.integers(0, 2**63, 10_000)]
    numbers[5_000:5_100] = [numbers[0]] * 100
    started = time.monotonic()
    found = find_near_duplicates(numbers)
    assert max(map(len, found)) == 101 and time.monotonic() - started < 20


def test_none_and_one_have_no_duplicates():
    assert find_near_duplicates([]) == find_near_duplicates([make(1)]) == []

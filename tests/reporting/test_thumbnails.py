"""Small pictures keep their shape, and stay within their budget."""

import base64
import io

from PIL import Image

from caption_train.reporting import thumbnails
from caption_train.reporting.thumbnails import LARGEST, make_thumbnails, shrink
from tests.fixtures.reports import write_noise


def open_address(thumbnail):
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.address.partition(",")[2])))


def test_the_shape_is_kept_and_small_images_are_not_enlarged():
    for size, expected in ((1200, 600), (384, 192)), ((20, 10), (20, 10)), ((5000, 2), (384, 1)):
        thumbnail = shrink(Image.new("RGB", size, "red"))
        assert (thumbnail.width, thumbnail.height) == expected == open_address(thumbnail).size


def test_what_compresses_badly_becomes_smaller(tmp_path):
    image = Image.open(write_noise(tmp_path / "noise", 1)[0])
    sizes = [shrink(image, room) for room in (LARGEST, 15_000, 4_000)]
    assert len(sizes[0].address) <= LARGEST and len(sizes[2].address) <= 4_000
    assert sizes[0].width > sizes[1].width > sizes[2].width
    assert shrink(image, 100) is None


def test_an_unreadable_image_has_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert [t is None for t in make_thumbnails([tmp_path / "a.png", tmp_path / "b.png"])] == [True, False]


def test_a_large_photo_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    """A thousand photos take about half the time so."""
    Image.linear_gradient("L").resize((3200, 2400)).save(tmp_path / "a.jpg")
    decoded = []
    monkeypatch.setattr(
        thumbnails, "shrink", lambda image, room: decoded.append(image.size) or shrink(image, room)
    )
    (thumbnail,) = make_thumbnails([tmp_path / "a.jpg"])
    assert decoded == [(800, 600)] and (thumbnail.width, thumbnail.height) == (384, 288)

import os
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caption_train.data.formats import IMAGE_SUFFIXES
from caption_train.data.images import ImageError, inspect_image, open_image
from caption_train.system.files import hash_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RED = (255, 0, 0)
FORMATS = {"png": 0, "jpg": 3, "webp": 3, "avif": 6, "bmp": 0, "gif": 0, "tiff": 0}


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image.png"


@pytest.mark.parametrize(("suffix", "tolerance"), FORMATS.items())
def test_every_format_opens_whatever_its_name_says(tmp_path, suffix, tolerance):
    saved = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 8), RED).save(saved)
    renamed = saved.rename(tmp_path / "a.png")
    assert pixels(renamed).shape == (8, 16, 3)
    assert abs(pixels(renamed) - RED).max() <= tolerance


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (32, 16), "blue")
    upright.paste(RED, (0, 0, 8, 8))
    # What the camera stored: the inverse of the turn that the tag asks for.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    image = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, quality=95)
    opened = open_image(path)
    assert opened.size == (32, 16)
    assert np.abs(np.asarray(opened.crop((1, 1, 6, 6))).astype(int) - RED).max() < 60


def test_damaged_exif_leaves_the_picture_usable(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 4), RED).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    assert pixels(path).shape == (4, 8, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_transparency_is_composited_on_white(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    image = Image.new(mode, (3, 1))
    ink = (0,) * (len(mode) - 1)
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*ink, alpha))
    image.save(path)
    assert pixels(path)[0, :, 0].tolist() == [255, 127, 0]


def test_one_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    for name, transparency in (("a.png", 0), ("b.gif", 0), ("c.png", bytes([0, 255]))):
        image.save(tmp_path / name, transparency=transparency)
        assert pixels(tmp_path / name).tolist() == [[[255, 255, 255], [0, 255, 0]]], name


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 7, 7))])
def test_one_transparent_colour_becomes_white(path, mode, colour):
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
    image.save(path, transparency=colour)
    assert pixels(path)[0, :, 0].tolist() == [255, 9]


def test_one_bit_and_palette_images_keep_their_colours(path):
    Image.new("1", (2, 2), 1).save(path)
    assert (pixels(path) == 255).all()
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 12, 34, 56])
    image.save(path)
    assert pixels(path)[0, 0].tolist() == [12, 34, 56]


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_becomes_rgb_not_its_negative(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    assert abs(pixels(path) - RED).max() <= 3


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_saturated(tmp_path, suffix, byte_order):
    path = tmp_path / f"a.{suffix}"
    values = np.array([[0, 257, 32768, 65535]], dtype=f"{byte_order}u2")
    Image.fromarray(values).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def write_png(path, size, bits, data):
    header = struct.pack(">2I5B", *size, bits, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def test_16_bit_colour_png_is_scaled(path):
    write_png(path, (1, 1), 16, b"\0" + struct.pack(">3H", 65535, 32768, 0))
    assert pixels(path)[0, 0].tolist() == [255, 128, 0]


def test_12_bit_tiff_is_scaled_by_12_bits(tmp_path):
    path = tmp_path / "a.tiff"
    # Two samples of 12 bits, 4095 and 0, in a hand-made TIFF with eight tags.
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (278, 1), (279, 3)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<2HIHH", t, 3, 1, v, 0) for t, v in tags)
    path.write_bytes(
        (b"II*\0" + struct.pack("<I", 8) + directory + b"\0" * 4).ljust(110, b"\0") + b"\xff\xf0\x00"
    )
    assert pixels(path)[0, :, 0].tolist() == [255, 0]


def test_float_grey_from_0_to_1_is_scaled(tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.array([[0, 300.0]], dtype=np.float32)), "float pixels from 0 to 300"),
        (Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "float pixels from nan"),
        (Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), "32-bit integer pixels"),
        (Image.new("LAB", (2, 2)), "CIELAB pixels"),
    ],
)
def test_pixels_without_an_agreed_meaning_are_refused_by_name(tmp_path, image, reason):
    path = tmp_path / "a.tiff"
    image.save(path)
    with pytest.raises(ImageError, match=rf"a\.tiff: {reason}"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert abs(pixels(path) - RED).max() <= 3


def bomb(path):
    write_png(path, (60_000, 60_000), 8, b"")


def truncate(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.touch(), r"empty \(0 bytes\)"),
        (lambda p: p.mkdir(), "(Is a directory|not a regular file)"),
        (os.mkfifo, "not a regular file"),
        (lambda p: p.write_bytes(b"<svg/>"), "not an image"),
        (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
        (bomb, "larger than 179 megapixels"),
        (truncate, ".*truncated"),
    ],
)
def test_what_cannot_be_decoded_is_one_line_that_names_the_file(path, make, reason):
    make(path)
    with pytest.raises(ImageError, match=rf"image\.png: {reason}") as caught:
        open_image(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_an_inspection_gives_the_bytes_hash_and_the_pixels(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 48), 50).convert("RGB").save(path)
    assert inspect_image(path) == (hash_file(path), 64 * 48)


@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_damaged_bytes_give_an_image_or_an_image_error(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    Image.new("RGB", (16, 16), RED).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert open_image(path).mode == "RGB"
    except ImageError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        with pytest.raises(ImageError):
            inspect_image(path)
    else:
        inspect_image(path)


def test_an_image_of_a_format_that_is_not_read_says_what_to_do(tmp_path):
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a")
    with pytest.raises(ImageError, match=r"a\.jxl: \.jxl files are not read: convert it to PNG or JPEG"):
        open_image(tmp_path / "a.jxl")


def test_heic_is_read_where_pillow_heif_is_installed_and_else_named(tmp_path):
    path = tmp_path / "a.heic"
    if find_spec("pillow_heif") is None:
        path.write_bytes(b"\0\0\0\x18ftypheic")
        with pytest.raises(ImageError, match=r"\.heic files are not read: pip install pillow-heif"):
            open_image(path)
        return
    import pillow_heif

    assert ".heic" in IMAGE_SUFFIXES
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path)
    image = open_image(path)
    assert image.size == (64, 48) and abs(image.getpixel((30, 20))[0] - 200) < 10

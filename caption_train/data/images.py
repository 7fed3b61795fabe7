"""Opens one image safely, for training and captioning alike: upright RGB on white, or an ImageError."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from caption_train.data.formats import HEIF_SUFFIXES, UNREAD_SUFFIXES, advise_unread
from caption_train.data.pairs import Pair
from caption_train.errors import CaptionTrainError
from caption_train.packed import PackedFile, open_regular
from caption_train.system.console import ProgressBar, escape_unprintable
from caption_train.system.files import TooLarge, read_regular_file

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
_HEIF = "HEIF"
BACKGROUND = (255, 255, 255)
_EMPTY = "empty (0 bytes)"
_MOST_IN_MEMORY = 64 << 20
"""Bytes of a file that is read as a whole to be checked."""
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


# Pillow warns above 89 megapixels and raises above 179. Some cameras reach the first limit, none the second.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# Pillow also warns of damaged tags, but names its own source file instead of the image. Damage that matters
# raises an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(CaptionTrainError):
    """An image that cannot be used; the message is one line that begins with its path."""


def open_image(path: Path | str, *, at_least: int | None = None) -> Image.Image:
    """Return an image file's first frame as 8-bit RGB, fully decoded, with the file closed again.

    The EXIF orientation is applied, and transparent pixels are put on white. 16-bit grey is scaled from its
    full range to 8 bits, float grey from 0-1.

    Args:
        path: the file.
        at_least: for a thumbnail: a JPEG may be decoded at a fraction of its size, both sides of at least so
            many pixels, which takes a fraction of the time.

    Raises:
        ImageError: the file is missing, empty, truncated, not an image or larger than 179 megapixels, or its
            pixels have no agreed 8-bit meaning (32-bit integers, floats outside 0-1, LAB).
    """
    with _opening(path) as (_, image):
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()
        return _upright_rgb(image)


def open_measured(path: Path | str, *, at_least: int) -> tuple[Image.Image, tuple[int, int], int]:
    """Return an image as `open_image` does, its full width and height as it is shown, and its bytes.

    Args:
        path: the file.
        at_least: as in `open_image`; the width and height are those before.

    Raises:
        ImageError: as `open_image`.
    """
    with _opening(path) as (file, image):
        width, height = image.size
        size = _size_of(file)
        image.draft(None, (at_least, at_least))
        image.load()
        drawn = image.size
        upright = _upright_rgb(image)
    is_turned = drawn[0] != drawn[1] and upright.size == drawn[::-1]
    return upright, (height, width) if is_turned else (width, height), size


def normalize_image(image: Image.Image) -> Image.Image:
    """Return an image in memory as `open_image` returns a file's: upright, 8-bit RGB, transparency on white.

    Raises ImageError for pixels that have no agreed 8-bit meaning.
    """
    try:
        return _upright_rgb(image)
    except ValueError as error:
        raise ImageError(str(error)) from error


def inspect_image(path: Path | str) -> tuple[str, int]:
    """Decode an image file to find out whether it is sound, without keeping the pixels.

    JPEG files are decoded at an eighth of their size: this reads every byte, but takes a third of the time.

    Returns:
        The SHA-256 of the file's bytes (hexadecimal), and how many pixels the image has.

    Raises:
        ImageError: as `open_image`.
    """
    with _explaining(path):
        # As a whole, if it is not very large: decoder and hash ask the system for a few bytes at a time.
        content = _read_whole(path)
        if content is None:
            with open_regular(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), _try_decoding(file, path)
        if not content:
            raise ValueError(_EMPTY)
        return hashlib.sha256(content).hexdigest(), _try_decoding(io.BytesIO(content), path)


def _read_whole(path: Path | str) -> bytes | None:
    """Return the bytes of a regular file; None if it is larger than _MOST_IN_MEMORY."""
    if isinstance(path, PackedFile):
        return path.read_bytes()
    with suppress(TooLarge):
        return read_regular_file(path, _MOST_IN_MEMORY)
    return None


def _try_decoding(file: IO[bytes], path: Path | str) -> int:
    """Decode an image, and return how many pixels it has."""
    file.seek(0)
    with Image.open(file, formats=_find_formats(path)) as image:
        pixels = image.width * image.height
        if image.format in ("JPEG", "MPO"):
            image.draft("L", (1, 1))
        image.load()
        if image.mode not in _PLAIN_MODES:
            _to_rgb(image)
        return pixels


def read_size(path: Path | str) -> int:
    """Return how many pixels an image file says it has, from its first bytes; 0 for what is no image."""
    try:
        with _opening(path) as (_, image):
            return image.width * image.height
    except ImageError:
        return 0


@contextmanager
def _opening(path: Path | str) -> Iterator[tuple[IO[bytes], Image.Image]]:
    """Open an image file and close it again; turn every error into an ImageError."""
    with _explaining(path), open_regular(path) as file:
        if not _size_of(file):
            raise ValueError(_EMPTY)
        with Image.open(file, formats=_find_formats(path)) as image:
            yield file, image


@contextmanager
def _explaining(path: Path | str) -> Iterator[None]:
    """Turn every error into an ImageError that begins with the path of the image."""
    try:
        yield
    # Pillow's decoders raise errors of any type for damaged files, not only OSError.
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, UnidentifiedImageError) and Path(path).suffix.lower() in UNREAD_SUFFIXES:
            suffix = Path(path).suffix
            reason = f"{suffix} files are not read: {advise_unread(suffix)}"
        raise ImageError(f"{escape_unprintable(path)}: {reason}") from error


def _size_of(file: IO[bytes]) -> int:
    """Return how many bytes a file has, and go back to where it was read."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return size


def _find_formats(path: Path | str) -> Sequence[str]:
    suffix = os.path.splitext(path)[1]  # noqa: PTH122 - of a million images
    if suffix.lower() not in HEIF_SUFFIXES or not find_spec("pillow_heif"):
        return FORMATS
    import pillow_heif

    if _HEIF not in Image.OPEN:
        pillow_heif.register_heif_opener()
    return (*FORMATS, _HEIF)


def _upright_rgb(image: Image.Image) -> Image.Image:
    _turn_upright(image)
    return _to_rgb(image)


def _turn_upright(image: Image.Image) -> None:
    # If the EXIF data is damaged, the orientation is unknown but the pixels are still good.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _scale_16_bit(image)
    elif image.mode == "F":
        image = _scale_float(image)
    elif image.mode in ("I", "LAB"):
        raise ValueError(
            f"{_ODD_MODES[image.mode]} pixels; save it with 8 or 16 bits per channel as RGB or grey"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, BACKGROUND)
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


_ODD_MODES = {"I": "32-bit integer", "LAB": "CIELAB"}


def _scale_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    # TIFF also stores 12-bit samples in this mode.
    bits = image.tag_v2[_BITS_PER_SAMPLE][0] if hasattr(image, "tag_v2") else 16
    top = (1 << bits) - 1
    return Image.fromarray(((values * 255 + top // 2) // top).clip(0, 255).astype(np.uint8))


_BITS_PER_SAMPLE = 258  # the number of the TIFF tag


def _scale_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"float pixels from {low:g} to {high:g}, only 0 to 1 has a meaning; save it with 8 or 16 bits"
        )
    return Image.fromarray((values * 255 + 0.5).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or damaged at its start (known: {', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return "larger than 179 megapixels, refused as a decompression bomb"
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return escape_unprintable(error)[:200] or type(error).__name__


def open_items(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """Yield one item for a collator per pair, with its prompt and whole caption; skip unreadable images."""
    for pair in pairs:
        try:
            yield pair.texts | {"image": open_image(pair.image)}
        except ImageError:
            continue


def estimate_megapixels(images: Sequence[Path | Image.Image], sample: int = 16) -> float:
    """Return how many megapixels an image has, from the headers of some; 1 if none can be read."""
    sizes = []
    for image in images[:: max(1, len(images) // sample)][:sample]:
        if isinstance(image, Image.Image):
            sizes.append(image.width * image.height)
            continue
        with suppress(OSError, ValueError, Image.DecompressionBombError), open_regular(image) as file:
            opened = Image.open(file)
            sizes.append(opened.width * opened.height)
    return sum(sizes) / len(sizes) / 1e6 if sizes else 1.0


def check_images(
    images: Sequence[Path],
    *,
    show_progress: bool = True,
    inspect: Callable[[Path], Any] = inspect_image,
    label: str = "checking images",
) -> list[Any]:
    """Read images in one thread a core, with a progress bar.

    Args:
        images: the files.
        show_progress: draw the bar, where a terminal shows it.
        inspect: what is done with each; `inspect_image` decodes it and returns its SHA-256 and pixels.
        label: what the bar says.

    Returns:
        For each image what `inspect` returned or, where it raised ImageError, that error.
    """

    def try_one(image: Path) -> Any:
        try:
            return inspect(image)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            found = []
            with ProgressBar(len(images), label, "image", shown=show_progress, leave=False) as bar:
                for result in pool.map(try_one, images):
                    found.append(result)
                    bar.update()
            return found
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise

"""Makes small pictures for a report, as `data:` addresses, within a budget of bytes."""

import base64
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from caption_train.data.images import ImageError, check_images, open_image
from caption_train.reporting.report import Thumbnail

MOST_BYTES = 16_000_000
"""All pictures of a report, as text; captions and page come on top, and all shall be below 20 MB."""
LARGEST = 40_000
STEPS = ((384, 75), (320, 65), (256, 55), (192, 50), (128, 45), (96, 35), (64, 25))
"""(longest side, WebP quality) pairs, tried one after the other until the bytes fit."""
SLACK = 1.3


def make_thumbnails(
    images: Sequence[Path],
    *,
    show_progress: bool = False,
    label: str = "checking images",
    largest: int = LARGEST,
) -> list[Thumbnail | None]:
    """Return a small picture of each image, None where it cannot be read or has no room.

    Args:
        images: the files.
        show_progress: draw a bar.
        label: what the bar says.
        largest: the most bytes of a picture.
    """
    room = min(largest, MOST_BYTES // max(len(images), 1))
    make = partial(_make, room=room)
    made = check_images(images, show_progress=show_progress, inspect=make, label=label)
    return [None if isinstance(result, ImageError) else result for result in made]


def _make(path: Path, room: int) -> Thumbnail | None:
    return shrink(open_image(path, at_least=STEPS[0][0]), room)


def shrink(image: Image.Image, room: int = LARGEST) -> Thumbnail | None:
    """Return a picture of at most `room` bytes as an address; None if none of the sizes fits."""
    steps, small = list(STEPS), image
    while steps:
        side, quality = steps.pop(0)
        if max(small.size) > side:
            # From the size before, which is much faster than from the whole image.
            small = small.resize(_fit(image.size, side), reducing_gap=3.0)
        content = io.BytesIO()
        small.save(content, "WEBP", quality=quality, method=2)
        address = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
        if len(address) <= room:
            return Thumbnail(address, *small.size)
        # Bytes grow no faster than pixels times quality, so that sizes that cannot fit are not tried.
        most = side**2 * quality * room / len(address)
        steps = [step for step in steps if step[0] ** 2 * step[1] <= most * SLACK] or steps[-1:]
    return None


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

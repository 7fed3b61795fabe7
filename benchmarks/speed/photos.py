"""Photo-like JPEG files of 1 and 12 megapixels and captions of about 20 words, for the speed benchmark."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fixtures.photos import draw_photo

SIZES = {1: (1152, 864), 12: (4000, 3000)}
"""Megapixels → width and height."""
CAPTION = (
    "a picture of a {colour} circle and a small blue square on a white background, left of a large triangle"
)
COLOURS = ("red", "green", "yellow", "black", "purple", "orange")


def write_photos(folder: Path, count: int, megapixels: int = 1) -> Path:
    """Write `count` JPEG files with captions beside them, unless they are there; return their folder.

    Clouds of colour with grain on them: a camera's picture has about as many bytes for a pixel, and takes
    about as long to decode.
    """
    made = folder / f"{count}-photos-{megapixels}-megapixels"
    if made.exists():
        return made
    draft = made.with_name(made.name + ".draft")
    draft.mkdir(parents=True, exist_ok=True)
    width, height = SIZES[megapixels]
    rng = np.random.default_rng(0)
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    for index in range(count):
        clouds = np.asarray(draw_photo(index, (width, height)), dtype=np.int16)
        photo = Image.fromarray((clouds + grain).clip(0, 255).astype(np.uint8))
        photo.save(draft / f"{index:03}.jpg", quality=90)
        caption = CAPTION.format(colour=COLOURS[index % len(COLOURS)])
        (draft / f"{index:03}.txt").write_text(caption, "utf-8")
    return draft.rename(made)

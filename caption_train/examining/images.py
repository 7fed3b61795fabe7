"""Measures images: size, soundness and what they look like, all from one decoding. Several threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from caption_train.data.images import ImageError, check_images, open_measured

SIDE = 128
"""What a JPEG is decoded to at least, which takes a fraction of the time; hashes need 32 pixels."""
GRID = 16
"""Colours are kept of so many places in each direction."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a sound image.

    Attributes:
        width, height: in pixels, as it is shown.
        size: the file's bytes.
        hash: its perceptual hash, 64 bits: near-duplicates differ in few of them.
        colours: GRID × GRID mean colours, as RGB bytes; equal hashes of plain images say little.
    """

    width: int
    height: int
    size: int
    hash: int
    colours: bytes

    @property
    def pixels(self) -> int:
        """How many pixels there are."""
        return self.width * self.height

    @property
    def aspect(self) -> float:
        """The longer side in units of the shorter one."""
        return max(self.width, self.height) / min(self.width, self.height)


def measure_images(images: Sequence[Path]) -> list[Measured | ImageError]:
    """Return what is known of each image or, where it cannot be used, why. Shows a progress bar."""
    return check_images(images, inspect=measure_image)


def measure_image(path: Path) -> Measured:
    """Decode an image once, and measure it; ImageError where training could not use it."""
    import imagehash

    image, (width, height), size = open_measured(path, at_least=SIDE)
    # From here on, work is small whatever the image's size.
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    bits = imagehash.phash(small).hash.flatten()
    colours = small.resize((GRID, GRID), Image.Resampling.BOX).tobytes()
    return Measured(width, height, size, sum(1 << place for place, bit in enumerate(bits) if bit), colours)

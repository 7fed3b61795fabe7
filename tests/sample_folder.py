"""Small dataset folders for tests."""

import zlib
from pathlib import Path

from PIL import Image


def write_image(path: Path, color: str | tuple = "red", size: tuple[int, int] = (4, 3)) -> Path:
    """Write a plain image in the format of its suffix, its folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_pair(image: Path, caption: str) -> Path:
    """Write an image of a colour that depends on its name, and its caption beside it."""
    write_image(
        image, tuple(zlib.crc32(image.name.encode("utf-8", "surrogateescape")).to_bytes(4, "big")[:3])
    )
    image.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return image

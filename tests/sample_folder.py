"""Small dataset folders for tests."""

import json
import re
import zlib
from pathlib import Path

from PIL import Image

from caption_train.compiling.compile import compile_captions
from caption_train.config.compiling import CompileOptions


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


def make_folder(folder: Path) -> Path:
    """Make a folder of four pairs with difficult names."""
    for name in ("a.png", "b/c.jpg", "b/train test val.png", "😀 é.webp"):
        write_pair(folder / name, f"caption of {name}")
    return folder


def compile_folder(folder, output=None, **options):
    return compile_captions(CompileOptions(folder, output, **options))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def counted(capsys, label):
    """Return the count the summary gives for a label, and the files listed under it."""
    table = capsys.readouterr().out
    match = re.search(rf"^ +{label} +([\d,]+).*\n((?:     .*\n)*)", table, re.MULTILINE)
    return int(match[1].replace(",", "")), [line.strip() for line in match[2].splitlines()]

"""Captions an image before and after an export, to prove that nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.config.exporting import ExportOptions
from caption_train.errors import CaptionTrainError

if TYPE_CHECKING:
    from PIL import Image

    from caption_train.families.base import Family, Generated


def caption_once(family: Family, model: Any, processor: Any, image: Image.Image, prompt: str) -> Generated:
    """Return the caption of one image, found by greedy search, at most 40 tokens long."""
    batch = family.encode(processor, [image], [prompt])
    (result,) = family.generate(model, processor, batch, num_beams=1, do_sample=False, max_new_tokens=40)
    return result


def check_same_tokens(before: Generated, after: Generated, options: ExportOptions) -> None:
    """Raise CaptionTrainError if the captions before and after the export have different tokens."""
    if before.token_ids == after.token_ids:
        return
    advice = "" if options.dtype == "float32" or not options.merge else "; --dtype float32 rounds nothing"
    raise CaptionTrainError(
        f"the result answers {after.text!r} instead of {before.text!r}, so nothing was written{advice}"
    )


def open_proof_image(path: Path | None) -> Image.Image:
    """Return the image that is captioned before and after: the one at `path`, or a drawn one."""
    if path is None:
        return _draw_image()
    from caption_train.data.images import open_image

    return open_image(path)


def _draw_image() -> Image.Image:
    """Draw a house under a sun, which is enough for every model to generate some text."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (640, 480), "#8ecae6")
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 330, 640, 480], fill="#588157")
    draw.ellipse([480, 40, 580, 140], fill="#ffb703")
    draw.rectangle([180, 200, 400, 380], fill="#d62828")
    draw.polygon([(150, 200), (290, 90), (430, 200)], fill="#6d4c41")
    draw.rectangle([260, 280, 320, 380], fill="#fefae0")
    return image

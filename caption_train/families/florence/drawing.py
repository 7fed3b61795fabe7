"""Draws Florence-2's answers on a copy of the image: boxes, quadrilaterals, polygons and labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from caption_train.families.florence.answers import Answer

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")
"""Each label gets the next colour; all are dark enough for white text."""


def draw_answer(image: Image.Image, answer: Answer) -> Image.Image:
    """Return an RGB copy of `image` with every shape of the answer outlined and labelled."""
    from PIL import ImageDraw

    drawn = image.convert("RGB")
    drawn = drawn.copy() if drawn is image else drawn
    draw = ImageDraw.Draw(drawn)
    shorter = min(drawn.size)
    width = max(1, shorter // 200)
    font = _load_font(max(10, shorter // 40))
    colors: dict[str, str] = {}
    outlines = list(_find_outlines(answer))
    for outline, label in outlines:
        color = colors.setdefault(label, COLORS[len(colors) % len(COLORS)])
        draw.line([*outline, *outline[:2]], fill=color, width=width)
    # A second loop, so that no outline is drawn over a label.
    for (left, top, *_), label in outlines:
        if label:
            _write_label(draw, (left, top), label, colors[label], font)
    return drawn


def _load_font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib, because Pillow's own has few letters beyond English."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _find_outlines(answer: Answer) -> Iterator[tuple[list[float], str]]:
    """Yield ([x1, y1, x2, y2, …], label) for every shape; a box becomes its four corners."""
    for kind in (name for name in ("bboxes", "quad_boxes", "polygons") if name in answer):
        labels = answer[f"{kind}_labels"] if f"{kind}_labels" in answer else answer["labels"]
        for shape, label in zip(answer[kind], labels, strict=True):
            if kind == "bboxes":
                left, top, right, bottom = shape
                yield [left, top, right, top, right, bottom, left, bottom], label
            else:
                outlines = shape if kind == "polygons" else [shape]
                yield from ((outline, label) for outline in outlines if outline)


def _write_label(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], label: str, color: str, font: object
) -> None:
    """Write white text on a patch of `color` above the corner, moved if needed to lie inside the image."""
    box = draw.textbbox((0, 0), label, font=font)
    size = box[2] + 4, box[3] + 4
    left = max(0, min(corner[0], draw.im.size[0] - size[0]))
    top = corner[1] - size[1] if corner[1] >= size[1] else corner[1]
    top = max(0, min(top, draw.im.size[1] - size[1]))
    draw.rectangle([left, top, left + size[0], top + size[1]], fill=color)
    draw.text((left + 2, top + 2), label, fill="white", font=font)

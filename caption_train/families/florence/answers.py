"""Parses Florence-2's answers: boxes, quadrilaterals and polygons in pixels, with their labels.

The grammar is that of the post-processing in Microsoft's processor: a text, then the location tokens that
belong to it. Each side of the image has 1000 bins; a coordinate is the middle of a bin, in float32 as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

Answer = dict[str, Any]
"""`bboxes` [x1, y1, x2, y2], `quad_boxes` [x1, y1, … x4, y4] or `polygons` (an instance is a list of
[x1, y1, …]), in pixels, with `labels`. Open-vocabulary detection has `bboxes_labels`, `polygons_labels`."""

BINS = 1000
PARSERS = {
    "<OD>": "boxes",
    "<DENSE_REGION_CAPTION>": "boxes",
    "<REGION_PROPOSAL>": "bare boxes",
    "<CAPTION_TO_PHRASE_GROUNDING>": "phrases",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "bare polygons",
    "<REGION_TO_SEGMENTATION>": "bare polygons",
    "<OPEN_VOCABULARY_DETECTION>": "boxes or polygons",
    "<OCR_WITH_REGION>": "quadrilaterals",
}
"""Task → how its answer is parsed; the answers to all other tasks are text."""

BANNED_PHRASES = frozenset(
    """it I me mine you your yours he him his she her hers they them their theirs one oneself we us our ours
    its myself yourself himself herself itself ourselves yourselves themselves this that these those who whom
    whose which what all another any anybody anyone anything each everybody everyone everything few many
    nobody none several some somebody someone something image images the a an lots""".split()  # noqa: SIM905
) | {"each other", "one another", "the image", "a group", "other objects", "a set"}
"""Phrases without a place in the image; the original leaves their boxes out too."""

_LOC = r"<loc_\d+>"
_GROUP = re.compile(r"<loc_(\d+)>" * 4)
_LABEL = re.compile(r"^\s*(.*?)(?=<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_)")
_POLYGON_LABEL = re.compile(r"^\s*(.*?)(?=<od>|</od>|<box>|</box>|<bbox>|</bbox>|<loc_|<poly>)")
_QUADRILATERAL = re.compile(r"(.+?)" + r"<loc_(\d+)>" * 8)
_POLYGON_PART = rf"(?:{_LOC}|<sep>|<poly>|</poly>)"


def parse_answer(text: str, task: str, image_size: tuple[int, int]) -> Answer | None:
    """Parse a generated text. Incomplete groups of location tokens are left out, as in the original.

    >>> parse_answer("cat<loc_0><loc_0><loc_499><loc_999>", "<OD>", (1000, 100))
    {'bboxes': [[0.5, 0.05000000074505806, 499.5, 99.95000457763672]], 'labels': ['cat']}

    Args:
        text: the generated text.
        task: the task token that it answers.
        image_size: (width, height) of the image in pixels.

    Returns:
        Shapes in pixels with their labels; None for a task that is answered in text.
    """
    kind = PARSERS.get(task)
    if kind is None:
        return None
    if kind == "quadrilaterals":
        return _parse_quadrilaterals(text.replace("<s>", ""), image_size)
    text = re.sub("<s>|</s>|<pad>", "", text)
    if kind == "boxes or polygons":
        polygons = _find_polygons(text, image_size, bare=False) if "<poly>" in text else []
        boxes = [] if "<poly>" in text else _find_boxes(text, image_size, bare=False)
        return {
            **_columns(boxes, "bboxes", "bboxes_labels"),
            **_columns(polygons, "polygons", "polygons_labels"),
        }
    if kind == "bare polygons":
        return _columns(_find_polygons(text, image_size, bare=True), "polygons", "labels")
    boxes = _find_boxes(text, image_size, bare=kind == "bare boxes", banned=kind == "phrases")
    return _columns(boxes, "bboxes", "labels")


def clean_text(text: str) -> str:
    """Return a text answer as the original does: `<s>` and `</s>` removed, spaces and `<pad>` kept."""
    return text.replace("<s>", "").replace("</s>", "")


def dequantize(bins: Sequence[int], image_size: tuple[int, int]) -> list[float]:
    """Turn bins [x, y, x, y, …] into pixels: (bin + 0.5) · side / 1000, in float32 as in the original."""
    import numpy as np

    scale = np.resize(np.array([side / BINS for side in image_size], dtype=np.float32), len(bins))
    return ((np.array(bins, dtype=np.float32) + np.float32(0.5)) * scale).tolist()


def quantize(points: Sequence[float], image_size: tuple[int, int]) -> str:
    """Turn points [x, y, x, y, …] in pixels into location tokens, for prompts and captions about regions.

    >>> quantize([0, 50, 640, 480], (640, 480))
    '<loc_0><loc_104><loc_999><loc_999>'
    """
    sides = [image_size[index % 2] for index in range(len(points))]
    bins = [
        min(max(int(point * BINS // side), 0), BINS - 1) for point, side in zip(points, sides, strict=True)
    ]
    return "".join(f"<loc_{number}>" for number in bins)


def _find_boxes(
    text: str, image_size: tuple[int, int], *, bare: bool, banned: bool = False
) -> Iterator[tuple[list[float], str]]:
    """Yield (box, label); `bare` boxes need no text before them, boxes of `banned` phrases are skipped."""
    for phrase in re.findall(rf"(?:{_LOC}){{4,}}" if bare else rf"[^<]+(?:{_LOC}){{4,}}", text):
        label = _LABEL.search(phrase)
        # The pattern does not match across lines. So the original loses a label with a line break, and its
        # boxes, and so does this.
        if label is None or (banned and label.group().strip() in BANNED_PHRASES):
            continue
        for group in _GROUP.findall(phrase):
            yield dequantize([int(number) for number in group], image_size), _to_ascii(label.group())


def _find_polygons(
    text: str, image_size: tuple[int, int], *, bare: bool
) -> Iterator[tuple[list[list[float]], str]]:
    """Yield (polygons of one instance, label); `<poly>` encloses an instance, `<sep>` ends a polygon."""
    pattern = rf"{_POLYGON_PART}{{4,}}" if bare else rf"[^<]+{_POLYGON_PART}{{4,}}"
    for phrase in re.findall(pattern, text):
        label = _POLYGON_LABEL.search(phrase)
        if label is None:
            continue
        whole = "<poly>" not in phrase or "</poly>" not in phrase
        for instance in [phrase] if whole else re.findall("<poly>(.*?)</poly>", phrase):
            polygons = [
                [int(number) for number in re.findall(r"\d+", part)]
                for part in re.findall(rf"((?:{_LOC})+)(?:<sep>|$)", instance)
            ]
            paired = [bins[: len(bins) // 2 * 2] for bins in polygons]
            if paired:
                yield [dequantize(bins, image_size) for bins in paired], label.group().strip()


def _parse_quadrilaterals(text: str, image_size: tuple[int, int]) -> Answer:
    found = [
        (dequantize([int(number) for number in numbers], image_size), content)
        for content, *numbers in _QUADRILATERAL.findall(text)
    ]
    return _columns(found, "quad_boxes", "labels")


def _columns(found: Any, shapes: str, labels: str) -> Answer:
    found = list(found)
    return {shapes: [shape for shape, _ in found], labels: [label for _, label in found]}


def _to_ascii(label: str) -> str:
    return label.strip().encode("ascii", errors="ignore").decode("ascii")

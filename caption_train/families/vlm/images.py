"""Images that every image processor takes: none too narrow, too small or larger than asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Batch

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from caption_train.families.vlm.processor import VlmProcessor

MAX_PIXELS = 1024 * 1024
"""Pixels of an image, where neither user nor checkpoint set a bound: about a thousand tokens in Qwen3-VL."""
MAX_ASPECT = 50
"""Longer images are padded: Qwen refuses 200 and more, tiling processors are left with rows of no pixels."""
MIN_SIDE = 16
"""Smaller images are enlarged: one that is 1 or 3 pixels high is taken for one with channels first."""
BACKGROUND = (255, 255, 255)
"""What is padded with, as transparency is composited on it."""


REFUSALS = (ValueError, ArithmeticError, IndexError, RuntimeError)
"""What image processors raise for a size that they cannot cut or resize."""


def fit_image(image: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Return an RGB image that any processor can read; most come back as they are.

    1000×4 is padded to 1000×20 (the picture in the middle), 1×1 enlarged to 16×16, and what has more than
    `max_pixels` made smaller, its aspect ratio kept.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        image = pad_image(image, math.ceil(max(width, height) / MAX_ASPECT))
    scale = max(1.0, MIN_SIDE / min(image.size))
    if max_pixels is not None:
        scale = min(scale, math.sqrt(max_pixels / (image.width * image.height)))
    if scale == 1:
        return image
    size = [max(1, math.floor(side * scale) if scale < 1 else round(side * scale)) for side in image.size]
    return image.resize(size, resample=3)  # bicubic, as the processors resize


def pad_image(image: Image.Image, least: int) -> Image.Image:
    """Return the image in the middle of a white one whose sides are `least` pixels or more."""
    from PIL import Image

    size = max(image.width, least), max(image.height, least)
    padded = Image.new("RGB", size, BACKGROUND)
    padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return padded


def read_images(
    read: Callable[[Sequence[Image.Image]], dict[str, Any]], images: Sequence[Image.Image]
) -> dict[str, Any]:
    """Return `read(images)`; images that it refuses are tried again as squares, so that none ends a folder.

    Raises:
        CaptionTrainError: an image is refused as a square too; the message has its size and the reason.
    """
    try:
        return read(images)
    except REFUSALS:
        return read([_find_readable(read, image) for image in images])


def _find_readable(
    read: Callable[[Sequence[Image.Image]], dict[str, Any]], image: Image.Image
) -> Image.Image:
    square = pad_image(image, max(image.size))
    for candidate in (image, square):
        try:
            read([candidate])
        except REFUSALS as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
        else:
            return candidate
    raise CaptionTrainError(f"an image of {image.width}×{image.height} pixels is refused: {reason}")


SHRINKS = 3
"""How often an image is made smaller before it is the prompt that is too long."""


def encode_fitting(
    processor: VlmProcessor, images: Sequence[Image.Image], prompts: Sequence[str]
) -> tuple[Batch, bool]:
    """Return what `encode` returns of images, and whether none had to be made smaller for its prompt."""
    fitted = [fit_image(image, processor.max_pixels) for image in images]
    batch = _read(processor, fitted, prompts)
    for count in range(SHRINKS):
        excess = _find_excess(processor, batch)
        if not any(excess):
            return batch, not count
        # An image of too many tokens is made smaller: one large photo must not end a folder or a run.
        fitted = [_shrink(image, part) for image, part in zip(fitted, excess, strict=True)]
        batch = _read(processor, fitted, prompts)
    if most := max(_find_excess(processor, batch)):
        limit = processor.tokenizer.model_max_length
        raise UsageError(
            f"--prompt: with an image it is {math.ceil(most * limit):,} tokens too long for the {limit:,} "
            "positions of the model: shorten it"
        )
    return batch, False


def is_text(name: str, value: Any, mask: torch.Tensor) -> bool:
    """Tell whether an entry of a batch has a value for each token, as its `attention_mask` does [B, T]."""
    return getattr(value, "shape", ())[:2] == mask.shape and not name.startswith(("pixel_", "image_"))


def _read(processor: VlmProcessor, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
    return read_images(
        lambda some: processor(some, prompts if len(some) == len(prompts) else prompts[:1]), images
    )


def _find_excess(processor: VlmProcessor, batch: Batch) -> list[float]:
    """Return by how much each row exceeds the model's positions, as a part of those; 0 where it fits."""
    limit = processor.tokenizer.model_max_length
    # There must be room for one token of a caption and its end.
    lengths = batch["attention_mask"].sum(dim=1) + len(processor.chat.end_ids) + 1
    return [max(length - limit, 0) / limit for length in lengths.tolist()]


def _shrink(image: Image.Image, excess: float) -> Image.Image:
    pixels = image.width * image.height
    return fit_image(image, math.floor(pixels / (1 + 2 * excess))) if excess else image

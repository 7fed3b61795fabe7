"""Cuts an image into Moondream 2's crops: the whole image, and overlapping windows of a larger copy.

Legend: C crops, H/W pixels, S = 378 the side of a crop. Source: vikhyat/moondream,
`moondream/torch/image_crops.py` and, for the crops before 2025, `moondream/hf/vision_encoder.py`. Images are
resized by PIL, as in the official code without libvips; libvips gives other pixels when it enlarges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

Images = Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]
"""One image, or several."""

_FIXED_SIZES = ((378, 378), (378, 756), (756, 378), (756, 756))


def select_tiling(height: int, width: int, *, window: int, margin: int, max_crops: int) -> tuple[int, int]:
    """Return how many rows and columns of windows cover an image.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        window: pixels that a further window adds, without the margins that it shares with its neighbours.
        margin: border of a window in pixels.
        max_crops: the largest number of windows.

    Returns:
        (rows, columns).
    """
    height, width = height - 2 * margin, width - 2 * margin
    if height <= window or width <= window:
        return 1, 1
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    if rows * columns > max_crops:
        ratio = math.sqrt(max_crops / (rows * columns))
        return max(1, math.floor(rows * ratio)), max(1, math.floor(columns * ratio))
    rows = max(rows, math.floor(math.sqrt(max_crops * height / width)))
    columns = max(columns, math.floor(math.sqrt(max_crops * width / height)))
    if rows * columns > max_crops:
        if columns > rows:
            columns = math.floor(max_crops / rows)
        else:
            rows = math.floor(max_crops / columns)
    return max(1, rows), max(1, columns)


def cut_crops(
    image: Image.Image, *, size: int = 378, patch: int = 14, margin: int = 4, max_crops: int = 12
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut an RGB image into the whole image and overlapping windows.

    The windows, row by row, are cut from a copy that is resized, whatever its aspect, to a whole number of
    windows. Neighbours overlap by two margins.

    Args:
        image: an RGB image.
        size: side of a crop in pixels.
        patch: side of a patch in pixels.
        margin: border of a window in patches.
        max_crops: the largest number of windows.

    Returns:
        Crops, uint8 [1 + rows × columns, size, size, 3], the whole image first; and (rows, columns).
    """
    border = margin * patch
    window = size - 2 * border
    tiling = select_tiling(image.height, image.width, window=window, margin=border, max_crops=max_crops)
    rows, columns = tiling
    canvas_size = (columns * window + 2 * border, rows * window + 2 * border)
    canvas = np.asarray(image.resize(canvas_size, Image.Resampling.LANCZOS))
    whole = canvas if tiling == (1, 1) else np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    tiles = [
        canvas[top : top + size, left : left + size]
        for top in range(0, rows * window, window)
        for left in range(0, columns * window, window)
    ]
    return np.stack([whole, *tiles]), tiling


def cut_fixed_crops(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut an RGB image as the releases of 2024 do.

    The image is resized to one of four sizes and cut without overlap; the whole image is a bilinear reduction
    of that copy.

    Returns:
        Crops, float32 0-255 [1 + rows × columns, 378, 378, 3], the whole image first; and (rows, columns).
    """
    width, height = image.size
    size = _FIXED_SIZES[0]
    if max(width, height) >= 512:
        size = min(
            _FIXED_SIZES,
            key=lambda s: (abs(s[1] / s[0] - width / height), abs(s[0] - width) + abs(s[1] - height)),
        )
    rows, columns = size[0] // 378, size[1] // 378
    canvas = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float32)
    tiles = canvas.reshape(rows, 378, columns, 378, 3).swapaxes(1, 2).reshape(-1, 378, 378, 3)
    # Halving an image with bilinear weights and without antialiasing takes the mean of each pair of pixels.
    whole = canvas.reshape(378, rows, 378, columns, 3).mean(axis=(1, 3))
    return np.concatenate([whole[None], tiles]), (rows, columns)


def normalise(crops: np.ndarray) -> np.ndarray:
    """Scale crops [C, H, W, 3] of 0-255 to float32 [C, 3, H, W] of -1 to 1."""
    pixels = crops.transpose(0, 3, 1, 2).astype(np.float32)
    return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def list_images(images: Images) -> list[Image.Image]:
    """Return one image or several as a list of PIL images; arrays are uint8 [H, W, 3], or [H, W] for grey."""
    one = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    return [i if isinstance(i, Image.Image) else Image.fromarray(i) for i in ([images] if one else images)]


class MoondreamImageProcessor(BaseImageProcessor):
    """Turns images into the crops of all of them, in one flat batch.

    `pixel_values` [C, 3, S, S] and `tilings` [I, 2] (rows, columns). An image has 1 + rows × columns crops.
    With one window only, the window equals the whole image, so there is a single crop.
    """

    model_input_names = ["pixel_values", "tilings"]

    def __init__(
        self,
        crops: str = "overlap",
        crop_size: int = 378,
        patch_size: int = 14,
        overlap_margin: int = 4,
        max_crops: int = 12,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.crops = crops
        self.crop_size, self.patch_size = crop_size, patch_size
        self.overlap_margin, self.max_crops = overlap_margin, max_crops

    def cut(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Return all crops of one image [1 + rows × columns, S, S, 3], and (rows, columns).

        Transparency is dropped and EXIF rotation is not applied, as in the official code.
        """
        image = image.convert("RGB")
        if self.crops == "fixed":
            return cut_fixed_crops(image)
        return cut_crops(
            image,
            size=self.crop_size,
            patch=self.patch_size,
            margin=self.overlap_margin,
            max_crops=self.max_crops,
        )

    def preprocess(self, images: Images, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Return `pixel_values` and `tilings` of the images; see the class."""
        images = list_images(images)
        crops, tilings = zip(*map(self.cut, images), strict=True)
        kept = [c[:1] if tiling == (1, 1) else c for c, tiling in zip(crops, tilings, strict=True)]
        pixel_values = normalise(np.concatenate(kept))
        data = {"pixel_values": pixel_values, "tilings": np.array(tilings, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

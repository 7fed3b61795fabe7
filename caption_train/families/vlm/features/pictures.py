"""Encodes images one by one, and those whose features are kept without opening them. Legend: T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caption_train.data.images import open_image
from caption_train.families.base import Batch
from caption_train.families.image_encoder import SINGLES, SIZE, Picture, Single
from caption_train.families.vlm.images import encode_fitting, is_text

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from caption_train.families.vlm.processor import VlmProcessor

MOST_ROWS = 1 << 14
"""How many sizes of images a process remembers the tokens of: some tens of megabytes."""


def hold_image(path: Any, image: Image.Image | None, features: Mapping[str, torch.Tensor]) -> Picture:
    """Return what `encode_pictures` takes; see `Family.hold_image`."""
    size = image.size if image is not None else tuple(features[SIZE].tolist())
    return Picture(size, path, image)


def encode_pictures(
    processor: VlmProcessor, images: Sequence[Image.Image | Picture], prompts: Sequence[str]
) -> Batch:
    """Return the text of B images and prompts, left-padded to [B, T], and each image's pixels.

    Alone in a batch, an image has the same inputs whatever others stand beside it. One whose features are
    kept is not opened: its size says how many tokens stand for it.

    Returns:
        Entries for the text and for positions, and `SINGLES`: a Single an image, None if it is not opened.
    """
    import torch

    rows, singles = [], []
    for image, prompt in zip(images, prompts, strict=True):
        row, single = _encode_picture(processor, image, prompt)
        rows.append(row)
        singles.append(single)
    width = max(row["attention_mask"].shape[1] for row in rows)
    batch: Batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if is_text(name, first, rows[0]["attention_mask"]):
            fill = processor.tokenizer.pad_token_id if name == "input_ids" else 0
            values = [_pad_left(value, width, fill) for value in values]
        if len({value.shape[1:] for value in values}) == 1:
            batch[name] = torch.cat(values)
    return batch | {SINGLES: singles}


def _encode_picture(
    processor: VlmProcessor, image: Image.Image | Picture, prompt: str
) -> tuple[Batch, Single | None]:
    """Return an image's row of text [1, T], and what the encoder takes of it."""
    picture = image if isinstance(image, Picture) else Picture(image.size, None, image)
    if picture.image is None:
        row = _find_row(processor, picture.size, prompt)
        if row is not None:
            return row, None
        picture.image = open_image(picture.path)
    batch, is_whole = encode_fitting(processor, [picture.image], [prompt])
    return _without_pixels(batch), Single(_list_inputs(batch), is_whole)


def _find_row(processor: VlmProcessor, size: tuple[int, int], prompt: str) -> Batch | None:
    """Return the row of any image of a size; None if the prompt leaves too little room for one.

    Rows are remembered as runs of equal tokens, because most tokens are the image's.
    """
    import torch
    from PIL import Image

    key = size, prompt, processor.system_prompt, processor.max_pixels
    if key not in processor.rows:
        batch, is_whole = encode_fitting(processor, [Image.new("RGB", size)], [prompt])
        if len(processor.rows) >= MOST_ROWS:
            processor.rows.pop(next(iter(processor.rows)))
        mask = batch["attention_mask"]
        runs = {
            name: torch.unique_consecutive(value[0], return_counts=True)
            if is_text(name, value, mask) and value.dim() == 2
            else value
            for name, value in _without_pixels(batch).items()
        }
        processor.rows[key] = runs if is_whole else None
    found = processor.rows[key]
    return found and {
        name: value[0].repeat_interleave(value[1])[None] if isinstance(value, tuple) else value
        for name, value in found.items()
    }


def _list_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return what `get_image_features` may take of the batch of one image."""
    mask = batch["attention_mask"]
    return {name: value for name, value in batch.items() if not is_text(name, value, mask)}


def _without_pixels(batch: Batch) -> Batch:
    """Return the text, and what tells where an image stands, such as Qwen's `image_grid_thw`."""
    return {name: value for name, value in batch.items() if not name.startswith("pixel_")}


def _pad_left(value: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    import torch

    padding = value.new_full((1, width - value.shape[1], *value.shape[2:]), fill)
    return torch.cat([padding, value], dim=1)

"""Defines the layers of Moondream 2 that transformers does not have.

Legend: I images, C crops of all images, P = 27 patches per side, N = P² image tokens, V width of the vision
tower, D width of the decoder. Source: vikhyat/moondream, `moondream/torch/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from caption_train.families.moondream.config import MoondreamConfig


class MoondreamProjector(nn.Module):
    """Turns whole-image and local features [I, N, 2V] into image embeddings [I, N, D]."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * config.vision_config.hidden_size, config.projector_dim)
        self.fc2 = nn.Linear(config.projector_dim, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class MoondreamRegion(nn.Module):
    """The weights of the detection heads. Captions never use them; they are kept for saving the model.

    They are parameters of one module, not layers. So quantization leaves them alone, and so do adapters whose
    targets end in `fc1` or are all Linear layers.
    """

    def __init__(self, region: dict[str, int], width: int) -> None:
        super().__init__()
        for name, shape in region_shapes(region, width).items():
            parameter = nn.Parameter(torch.zeros(shape), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), parameter)


def region_shapes(region: dict[str, int], width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the detection heads' 14 tensors, by official name without `region.`.

    Args:
        region: dimensions of the heads, as in the official config.
        width: D.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for head, axes in (("coord", 1), ("size", 2)):
        features, out, inner = region[f"{head}_feat_dim"], region[f"{head}_out_dim"], region["inner_dim"]
        shapes[f"{head}_features"] = (axes, features // 2)
        layers = {"encoder": (width, features), "decoder.fc1": (inner, width), "decoder.fc2": (out, inner)}
        for layer, shape in layers.items():
            shapes[f"{head}_{layer}.weight"], shapes[f"{head}_{layer}.bias"] = shape, shape[:1]
    return shapes


def stitch_windows(windows: torch.Tensor, tiling: tuple[int, int], margin: int) -> torch.Tensor:
    """Join the features of overlapping windows into one grid, without the overlap.

    A window loses `margin` patches on every side where it has a neighbour; the image's own borders are kept.

    Args:
        windows: [rows × columns, P, P, V], row by row.
        tiling: (rows, columns).
        margin: overlap to remove on each side, in patches.

    Returns:
        [rows × (P - 2 margin) + 2 margin, columns × (P - 2 margin) + 2 margin, V].
    """
    rows, columns = tiling
    height, width = windows.shape[1:3]

    def inner(place: int, count: int, length: int) -> slice:
        return slice(margin if place > 0 else 0, length - margin if place < count - 1 else length)

    return torch.cat(
        [
            torch.cat(
                [
                    windows[row * columns + column, inner(row, rows, height), inner(column, columns, width)]
                    for column in range(columns)
                ],
                dim=1,
            )
            for row in range(rows)
        ]
    )


def count_crops(tilings: Sequence[Sequence[int]]) -> list[int]:
    """Return how many crops images of these (rows, columns) have: all windows, and the whole image."""
    return [1 if rows * columns == 1 else 1 + rows * columns for rows, columns in tilings]


def find_image_tokens(input_ids: torch.Tensor, image_token_id: int, count: int) -> torch.Tensor:
    """Return a mask [B, T] of the tokens that stand for the image.

    Args:
        input_ids: [B, T].
        image_token_id: the id that stands for the image; the same id may occur in the text after it.
        count: how many there are in each row; only the first ones count.
    """
    found = input_ids == image_token_id
    return found & (found.cumsum(-1) <= count)

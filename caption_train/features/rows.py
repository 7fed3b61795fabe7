"""Where the features of a batch's images come from, as a batch carries it from a worker to the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from caption_train.families.image_encoder import Tensors

ROWS = "feature_rows"
"""The entry of a batch that holds its `Rows`."""


@dataclass
class Packed:
    """Tensors of any shapes in one, so that a batch takes one file between processes, and not one an image.

    Attributes:
        flat: all their numbers.
        shapes: the shape of each.
    """

    flat: torch.Tensor
    shapes: Sequence[torch.Size]

    def unpack(self) -> list[torch.Tensor]:
        """Return the tensors."""
        parts = self.flat.split([math.prod(shape) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def pack(images: Sequence[Tensors]) -> dict[str, Packed]:
    """Return the tensors of images that have the same names, by name."""
    return {
        name: Packed(
            torch.cat([image[name].reshape(-1) for image in images]), [image[name].shape for image in images]
        )
        for name in (images[0] if images else ())
    }


def unpack(packed: Mapping[str, Packed]) -> list[dict[str, torch.Tensor]]:
    """Return the images' tensors by name; [] if there is no image."""
    columns = {name: tensors.unpack() for name, tensors in packed.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@dataclass
class Rows:
    """Where the features of a batch's B images come from.

    Attributes:
        digests: of each image the name that its features are kept under; None keeps none.
        sizes: (width, height) of each image.
        kept: the places in the batch of the images whose features were read.
        features: of those images.
        inputs: what the encoder takes of all others, where images are encoded one by one; None where it takes
            the batch's pixels.
    """

    digests: Sequence[str | None]
    sizes: Sequence[tuple[int, int]] = ()
    kept: Sequence[int] = ()
    features: Mapping[str, Packed] = field(default_factory=dict)
    inputs: Mapping[str, Packed] | None = None

    @property
    def missing(self) -> list[int]:
        """The places of the images whose features were not read."""
        kept = set(self.kept)
        return [place for place in range(len(self.digests)) if place not in kept]

    def map_tensors(self, change: Callable[[torch.Tensor], Any]) -> Rows:
        """Return the same with changed tensors, as `hand_over` sends them to another process."""

        def map_packed(packed: Mapping[str, Packed]) -> dict[str, Packed]:
            return {name: replace(tensors, flat=change(tensors.flat)) for name, tensors in packed.items()}

        inputs = None if self.inputs is None else map_packed(self.inputs)
        return replace(self, features=map_packed(self.features), inputs=inputs)

    def pin_memory(self) -> Rows:
        """Copy the tensors to page-locked memory. The DataLoader calls this."""
        return self.map_tensors(torch.Tensor.pin_memory)

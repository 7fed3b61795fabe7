"""What turns an image into the features that `--cache_features` keeps. torch is imported inside functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import nn

Tensors = Mapping[str, "torch.Tensor"]

FEATURES = "features"
"""The name of a tower's only tensor of an image."""
SIZE = "image_size"
"""The name that an image's (width, height) is kept under, where the model is given the features."""
SINGLES = "singles"
"""The entry of a batch with a `Single` for each image, where images are prepared one by one."""


@dataclass
class ImageEncoder:
    """A frozen vision tower that the model calls by itself, once for all images of a batch.

    Attributes:
        owner: the object with the method that turns pixels into features.
        method: its name. It takes the entries of a batch in `Family.image_inputs`, and returns a row an
            image, as a tensor or as `last_hidden_state`.
        modules: those that the method runs.
        parameters: what it uses besides, by name.
    """

    owner: Any
    method: str
    modules: Sequence[nn.Module]
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    is_given: ClassVar[bool] = False
    """Whether the model is given the features among the entries of a batch, and does not call the method."""

    def take(self, output: Any) -> dict[str, torch.Tensor]:
        """Return what is kept of what the method returned for one image."""
        import torch

        return {FEATURES: (output if isinstance(output, torch.Tensor) else output.last_hidden_state)[0]}

    def join(self, images: Sequence[Tensors]) -> Any:
        """Return what the method returns for images, from what `take` took of each."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features = torch.stack([image[FEATURES] for image in images])
        is_forward = self.method == "forward"
        return BaseModelOutputWithPooling(last_hidden_state=features) if is_forward else features


@dataclass
class Picture:
    """An image of a run that keeps features, in the place of the PIL image that `Family.encode` takes.

    Attributes:
        size: (width, height), which decides how many tokens stand for the image.
        path: its file.
        image: the image; None if its features are kept, and it was not opened.
    """

    size: tuple[int, int]
    path: Path
    image: Image.Image | None = None


@dataclass
class Single:
    """What the image encoder takes of one image.

    Attributes:
        inputs: arguments of the encoder's method, by name.
        is_whole: whether they depend on the image alone. They do not where a long prompt left too little
            room, and the image was made smaller: such features are not kept.
    """

    inputs: Tensors
    is_whole: bool = True

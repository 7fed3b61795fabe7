"""A model's image encoder and projector, whose outputs transformers' models take as `mm_encoder_outputs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from caption_train.errors import UsageError
from caption_train.families.image_encoder import ImageEncoder, Tensors
from caption_train.families.vlm.parts import list_outside_language

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POOLED, DEEPSTACK = "pooler_output", "deepstack_features"
_READ = re.compile(r'mm_encoder_outputs\["image"\]\.(\w+)')


@dataclass
class GivenEncoder(ImageEncoder):
    """What `get_image_features` makes of an image: embeddings for the places of its tokens.

    Attributes:
        is_tensor: whether the model wants the images' embeddings in one tensor; otherwise they are a list.
    """

    is_tensor: bool = False
    is_given: ClassVar[bool] = True

    def take(self, output: Any) -> dict[str, torch.Tensor]:
        """Return an image's embeddings, and those for deeper layers (Qwen3-VL's deepstack), each [T, D].

        What a model wants as one tensor has a first dimension of 1, or of an image's tiles.
        """
        pooled = getattr(output, POOLED)
        self.is_tensor = not isinstance(pooled, list | tuple)
        layers = getattr(output, DEEPSTACK, None) or ()
        return {
            POOLED: pooled if self.is_tensor else pooled[0],
            **{f"{DEEPSTACK}.{number}": layer[0] for number, layer in enumerate(layers)},
        }

    def join(self, images: Sequence[Tensors]) -> dict[str, Any]:
        """Return the entry of a batch with the embeddings of its images."""
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooled = [image[POOLED] for image in images]
        output = BaseModelOutputWithPooling(pooler_output=torch.cat(pooled) if self.is_tensor else pooled)
        count = sum(name.startswith(DEEPSTACK) for name in images[0])
        if count:
            layers = (f"{DEEPSTACK}.{number}" for number in range(count))
            output.deepstack_features = [[image[layer] for image in images] for layer in layers]
        return {"mm_encoder_outputs": {"image": output}}


def find_image_encoder(model: PreTrainedModel) -> GivenEncoder:
    """Return what makes embeddings of images; see `Family.find_image_encoder`.

    Raises:
        UsageError: the type cannot be given them, or reads more of its encoder than is kept.
    """
    inner = model.base_model
    read = set(_READ.findall(_source(type(inner).forward)))
    if (
        "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters
        or not hasattr(inner, "get_image_features")
        or not {POOLED} <= read <= {POOLED, DEEPSTACK}
    ):
        kind = model.config.model_type
        raise UsageError(f"--cache_features: a {kind} model cannot be given kept features: drop it")
    modules, parameters = list_outside_language(model)
    return GivenEncoder(inner, "get_image_features", modules, parameters)


def _source(function: Any) -> str:
    return inspect.getsource(inspect.unwrap(function))

"""What a model family is. No torch here or at the top of a family's file: `--help` reads these facts too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers.utils.quantization_config import BitsAndBytesConfig

Batch = dict[str, Any]
"""Keyword arguments of a model's forward: `pixel_values` [B, C, H, W], `input_ids` [B, T], `labels` [B, T]"""


@dataclass(frozen=True)
class Generated:
    """One generated caption.

    text: decoded, special tokens and surrounding space removed (location tokens of Florence-2 are kept).
    token_ids: as generated, without start and padding tokens, with the end token when there is one.
    finished: an end token was generated; False means the caption was cut at the token limit.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finished: bool = True


class Family(Protocol):
    """A model family: facts, and four verbs. Training and captioning only ever see this."""

    name: str
    title: str
    inference_script: str
    model_id: str
    revision: str | None
    base_models: Sequence[str]
    lora_target_modules: Sequence[str]
    train_defaults: Mapping[str, Any]
    """Defaults of training flags that differ from `TrainOptions`, by field name."""
    default_prompt: str
    """What `encode` is given when the user names no prompt: a task token, a sentence, or "" for none."""
    tasks: Sequence[str]
    """Task tokens that `--task` offers; empty where the family has none."""
    parts: Mapping[str, str]
    """`vision`, `projector`, `language`: a regular expression that fully matches the part's module names."""

    def load(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Load the model (eval mode, on the CPU unless quantized on a device) and its processor.

        `dtype` None means float32. Nothing is left random and no remote code runs.
        """
        ...

    def encode(
        self, processor: ProcessorMixin, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Batch:
        """Turn B RGB images and B prompts into what the model reads, in training and in generation alike."""
        ...

    def make_collator(
        self, processor: ProcessorMixin, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return a picklable function from `{"image": PIL.Image, "caption": str}` items to a training batch.

        `model(**batch).loss` is the training loss: mean cross-entropy over caption tokens and the end token;
        `labels` [B, T] hold IGNORE_INDEX wherever none is due. `max_length` limits the caption in tokens, end
        token included; a longer caption is cut before it. An item may carry its own `"prompt"`.
        """
        ...

    def generate(
        self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch, **settings: Any
    ) -> list[Generated]:
        """Caption a batch made by `encode` (already on the model's device), B results in order.

        `settings` are transformers' generation arguments (num_beams, max_new_tokens, …); what is not given is
        what the checkpoint's authors chose.
        """
        ...

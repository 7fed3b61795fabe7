"""What a model family is. No torch is imported here: `--help` reads these facts too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import LoraConfig, PeftModel
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


@dataclass(frozen=True)
class ModelFacts:
    """What depends on the checkpoint, and is known from its config.json alone.

    lora_target_modules: names, or ends of names, of the modules that a LoRA trains if the user names none.
    parts: `vision`, `projector`, `language`: a regular expression that fully matches the part's module names.
    default_prompt: what `encode` is given when the user names no prompt: a task token, a sentence, or "".
    notes: what is said before such a model is trained.
    """

    lora_target_modules: tuple[str, ...]
    parts: Mapping[str, str]
    default_prompt: str
    notes: tuple[str, ...] = ()


class Family(ABC):
    """A model family: facts, and four methods that it must have. Training and captioning only ever see this.

    What else a family may do has a default here, so that nobody has to ask whether it can.
    """

    name: str
    title: str
    training_script: str
    inference_script: str
    model_id: str | None
    """The model that is trained and captioned with unless the user names one; None where the user must."""
    revision: str | None = None
    """The release of `model_id` that is used unless the user names one."""
    base_models: Sequence[str] = ()
    """The official models, by their ids on the hub."""
    facts: ModelFacts
    """What `describe` returns unless the family looks at the checkpoint."""
    train_defaults: Mapping[str, Any] = {}
    """Defaults of training flags that differ from `TrainOptions`, by field name."""
    tasks: Sequence[str] = ()
    """Task tokens that `--task` offers; empty where the family has none."""
    presets: Mapping[str, str] = {}
    """Prompts that `--preset` offers, by name; empty where the family reads none."""
    settings: Sequence[str] = ()
    """Flags that shape what the processor makes of a prompt and an image: names of `configure`'s settings."""
    draws_answers = False
    """Whether `draw_answer` has something to draw: `--visualize`."""
    converts_checkpoints = False
    """Whether some checkpoints are converted when they load: `--cache_converted`."""
    cache_converted = False
    """Whether `load` keeps what it converted, and uses what it kept."""
    has_legacy_layout = False
    """Whether `save_legacy` writes a second layout."""
    load_elsewhere = ""
    """What the model card says beside `PeftModel.from_pretrained`; {base} becomes the base."""

    def describe(self, model_id: str, revision: str | None = None) -> ModelFacts:
        """Return what depends on the checkpoint. Reads config.json at most, never weights."""
        return self.facts

    @abstractmethod
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

    @abstractmethod
    def encode(
        self, processor: ProcessorMixin, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Batch:
        """Turn B RGB images and B prompts into what the model reads, in training and in generation alike."""

    @abstractmethod
    def make_collator(
        self, processor: ProcessorMixin, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return a picklable function from `{"image": PIL.Image, "caption": str}` items to a training batch.

        `model(**batch).loss` is the training loss: mean cross-entropy over caption tokens and the end token;
        `labels` [B, T] hold IGNORE_INDEX wherever none is due. `max_length` limits the caption in tokens, end
        token included; a longer caption is cut before it. An item may carry its own `"prompt"`.
        """

    @abstractmethod
    def generate(
        self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch, **settings: Any
    ) -> list[Generated]:
        """Caption a batch made by `encode` (already on the model's device), B results in order.

        `settings` are transformers' generation arguments (num_beams, max_new_tokens, …); what is not given is
        what the checkpoint's authors chose.
        """

    def check_prompt(self, prompt: str) -> None:  # noqa: B027  (most families read any prompt)
        """Raise UsageError for a prompt that no model of this family can read, before one is loaded."""

    def check_inputs(self, processor: ProcessorMixin, prompts: Sequence[str]) -> None:
        """Raise UsageError for a prompt that this model cannot read: refused here, not in a data worker.

        prompts: all that a run will use, each once. By default the longest is tried.
        """
        from PIL import Image

        self.encode(processor, [Image.new("RGB", (32, 32))], [max(prompts, key=len)])

    def configure(self, processor: ProcessorMixin, settings: Mapping[str, Any]) -> None:  # noqa: B027
        """Apply values of the flags in `settings` to a processor; None is the checkpoint's own."""

    def read_settings(self, processor: ProcessorMixin) -> dict[str, Any]:
        """Return the settings in effect, by flag, as an adapter's record keeps them for captioning."""
        return {}

    def describe_inputs(self, processor: ProcessorMixin) -> list[str]:
        """Return lines on what the model reads of an image, such as how many tokens it takes."""
        return []

    def parse_answer(self, text: str, prompt: str, image_size: tuple[int, int]) -> Any:
        """Return the boxes of a generated text, in pixels of an image (width, height) large; None if none."""
        return None

    def draw_answer(self, image: Image.Image, answer: Any) -> Image.Image:
        """Return a copy of `image` with what `parse_answer` found drawn on it."""
        raise UsageError(f"--visualize: {self.title} gives no boxes to draw")

    def convert_adapter(
        self, folder: Path | str, model: PreTrainedModel
    ) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
        """Return another tool's adapter as PEFT's config and weights for `model`; None if it is PEFT's."""
        return None

    def prepare_merge(self, model: PeftModel) -> None:  # noqa: B027  (most adapters can be merged as they are)
        """Change what must be changed before the adapter of `model` can be merged."""

    def save_adapter(self, model: PreTrainedModel, source: Path | str, folder: Path, *, legacy: bool) -> None:
        """Write the adapter in `source`, which fits `model`, into `folder` with the names of a layout."""
        raise UsageError(f"{source} is {self.title}'s only layout already; --merge writes the model")

    def save_legacy(self, model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
        """Write the model in the family's second layout, that of its authors' own code."""
        raise UsageError(f"--layout legacy: {self.title} has one layout only")

    def save_processor(self, processor: ProcessorMixin, folder: Path) -> None:
        """Write what `AutoProcessor` needs to load the processor from `folder`."""
        processor.save_pretrained(folder)

    def find_stored_dtype(self, model_id: str, revision: str | None = None) -> torch.dtype:
        """Return the precision that a checkpoint is stored in: that of what is merged and exported."""
        import torch

        return torch.float32

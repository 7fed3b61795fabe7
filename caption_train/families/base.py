"""Defines the base class of model families. No torch is imported, because `--help` reads these facts too."""

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

    from caption_train.families.image_encoder import ImageEncoder, Picture, Tensors

Batch = dict[str, Any]
"""Arguments of a model's forward: `pixel_values` [B, C, H, W], `input_ids` [B, T], `labels` [B, T]."""


SERVER_FLAGS = ("endpoint", "model", "concurrency", "timeout", "retries")
"""Flags of captioning through a server."""


@dataclass(frozen=True)
class Generated:
    """One generated caption.

    Attributes:
        text: the decoded text, without special tokens and surrounding space; location tokens are kept.
        token_ids: the generated ids, without start and padding tokens, with the end token if there is one.
        finished: whether an end token was generated; False means the caption was cut at the token limit.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    finished: bool = True


@dataclass(frozen=True)
class ModelFacts:
    """What depends on the checkpoint and is known from its config.json alone.

    Attributes:
        lora_target_modules: names, or ends of names, of the modules that a LoRA trains by default.
        parts: `vision`, `projector` and `language`, each with a regular expression that matches the whole
            name of every module in that part, and no other.
        default_prompt: the prompt if the user gives none: a task token, a sentence, or "".
        notes: lines to print before such a model is trained.
    """

    lora_target_modules: tuple[str, ...]
    parts: Mapping[str, str]
    default_prompt: str
    notes: tuple[str, ...] = ()


class Family(ABC):
    """A model family: some facts, and four methods that each family must have.

    Training and captioning see models only through this class. Everything else that a family may offer has a
    default here, so no code has to check whether a method exists.
    """

    name: str
    title: str
    training_script: str
    inference_script: str
    model_id: str | None
    """The base model if the user names none; None where the user must name one."""
    example_model = ""
    """A model to name in messages where the user must name one."""
    revision: str | None = None
    """The revision of `model_id` if the user names none."""
    base_models: Sequence[str] = ()
    """Ids of the official models on the hub."""
    facts: ModelFacts
    """What `describe` returns, unless the family overrides it to read the checkpoint's config.json."""
    train_defaults: Mapping[str, Any] = {}
    """Defaults of training flags that differ from `TrainOptions`, by field name."""
    tasks: Sequence[str] = ()
    """Task tokens that `--task` offers; empty if the family has none."""
    presets: Mapping[str, str] = {}
    """Prompts that `--preset` offers, by name; empty if the family reads none."""
    settings: Sequence[str] = ()
    """Flags that change what the processor makes of prompt and image: the names that `configure` takes."""
    can_be_served = False
    """Whether `write_conversation` asks a server that speaks OpenAI's chat API: `--endpoint`."""
    draws_answers = False
    """Whether `draw_answer` has something to draw, so that `--visualize` is allowed."""
    converts_checkpoints = False
    """Whether some checkpoints are converted when they are loaded, so that `--cache_converted` is allowed."""
    cache_converted = False
    """Whether `load` keeps converted checkpoints on disk and uses them the next time."""
    keeps_features = False
    """Whether `find_image_encoder` finds the vision tower, so that `--cache_features` is allowed."""
    has_recordable_steps = False
    """Whether `generate` hands its arguments to that of transformers, so that `--cuda_graphs` is allowed."""
    kept_parts: Sequence[str] = ("vision",)
    """The parts that make the features which `--cache_features` keeps: they stay frozen."""
    reads_one_size = False
    """Whether all images are resized to one size, which `find_side` tells, so `--draft_decode` is allowed."""
    features_vary = False
    """Whether the features of a large image are larger than those of a small one: `weigh_image` says how."""
    image_inputs: Sequence[str] = ("pixel_values",)
    """The entries of a batch that the image encoder takes, in its order."""
    plans_without_weights = False
    """Whether `load_empty` makes a model, so that `--plan` needs no weights."""
    has_legacy_layout = False
    """Whether the family has a legacy layout besides the native one, which `save_legacy` writes."""
    load_elsewhere = ""
    """What the model card adds to `PeftModel.from_pretrained`; {base} is replaced by the base model."""

    def flag_choices(self) -> dict[str, tuple[str, ...]]:
        """Return the values that this family allows for flags whose values differ between families."""
        return {"task": tuple(self.tasks), "preset": tuple(self.presets)}

    def absent_flags(self) -> set[str]:
        """Return the names of flags that only other families have."""
        absent = {
            "task": not self.tasks,
            "preset": not self.presets,
            "cuda_graphs": not self.has_recordable_steps,
            "draft_decode": not self.reads_one_size,
            "visualize": not self.draws_answers,
            "cache_converted": not self.converts_checkpoints,
            **dict.fromkeys(("cache_features", "cache_limit"), not self.keeps_features),
            **{name: name not in self.settings for name in ("system_prompt", "max_pixels")},
            **dict.fromkeys(SERVER_FLAGS, not self.can_be_served),
        }
        return {name for name, is_absent in absent.items() if is_absent}

    def describe(self, model_id: str, revision: str | None = None) -> ModelFacts:
        """Return what depends on the checkpoint. Reads config.json at most, never the weights."""
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
        """Load a model in eval mode, and its processor.

        No weight is left random, and no code from the checkpoint's repository is run.

        Args:
            model_id: a folder, or a model on the hub.
            revision: branch, tag or commit on the hub.
            dtype: precision of the weights; None means float32.
            quantization_config: how to quantize the weights, if at all.

        Returns:
            The model, on the CPU unless it is quantized on a device, and its processor.
        """

    def load_empty(
        self, model_id: str, *, revision: str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Return a model of the checkpoint's shapes on the meta device, and its processor: see `load`."""
        raise NotImplementedError(f"{self.title} are planned with their weights")

    @abstractmethod
    def encode(
        self, processor: ProcessorMixin, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Batch:
        """Turn B RGB images and B prompts into model inputs, in the same way for training and generation."""

    @abstractmethod
    def make_collator(
        self, processor: ProcessorMixin, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return the function that turns items into a training batch; it can be pickled.

        An item is `{"image": PIL.Image, "caption": str}`, and may carry its own `"prompt"`.
        `model(**batch).loss` is the mean cross-entropy over the tokens of the caption and its end token.
        `labels` [B, T] are IGNORE_INDEX at all positions without a loss.

        Args:
            processor: the model's processor.
            prompt: the prompt of items without one of their own.
            max_length: limit of the caption in tokens, end token included; a longer caption is cut to fit.
        """

    @abstractmethod
    def generate(
        self, model: PreTrainedModel, processor: ProcessorMixin, batch: Batch, **settings: Any
    ) -> list[Generated]:
        """Generate captions for a batch.

        Args:
            model: the model, with or without an adapter.
            processor: the model's processor.
            batch: B rows made by `encode`, already on the model's device.
            settings: generation arguments of transformers (num_beams, max_new_tokens, …). Settings that are
                not given are what the authors of the checkpoint chose.

        Returns:
            B captions, in the order of the rows.
        """

    def speed_up(self, model: PreTrainedModel) -> None:
        """Make a model that only captions, in eval mode and not quantized, faster.

        Its captions stay the same up to rounding. The adapter, if any, is put on it later.
        """
        from caption_train.families.decoding.few_rows import speed_up_few_rows

        speed_up_few_rows(model)

    def find_image_encoder(self, model: PreTrainedModel) -> ImageEncoder:
        """Return what turns pixels into the features that `--cache_features` keeps.

        Args:
            model: the model; inside of it may be an adapter, around it there is none.

        Raises:
            UsageError: this kind of model cannot be given features.
        """
        raise NotImplementedError(f"{self.title} keeps no features")

    def hold_image(self, path: Path, image: Image.Image | None, features: Tensors) -> Image.Image | Picture:
        """Return what `encode` takes for an image of a run that keeps features.

        Args:
            path: its file.
            image: the image; None if its features are kept.
            features: those; {} if there are none.
        """
        from PIL import Image

        return image or Image.new("RGB", (32, 32))

    def weigh_image(self, processor: ProcessorMixin, size: tuple[int, int]) -> float:
        """Return how large the features of an image of (width, height) are, in a unit of the family's own."""
        return 1.0

    def split_images(self, *inputs: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Return the arguments of the image encoder's method, in `image_inputs`, for each image alone."""
        return [tuple(tensor[row : row + 1] for tensor in inputs) for row in range(len(inputs[0]))]

    def keep_images(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return a batch of `encode` or a collator with the pixels of some images only, and all its text.

        Where the images are `SINGLES`, it is not called.
        """
        return batch | {"pixel_values": batch["pixel_values"][list(places)]}

    def tokenize_caption(self, processor: ProcessorMixin, caption: str) -> list[int]:
        """Return the ids of a caption as training learns them, uncut, without those of start and end.

        The names of control tokens that a caption spells out, such as `</s>`, stay text.
        """
        from caption_train.families.caption_ids import caption_ids

        return caption_ids(processor.tokenizer, caption, self.control_ids(processor))

    def load_text_processor(self, model_id: str, *, revision: str | None = None) -> ProcessorMixin:
        """Return what `tokenize_caption` takes for a processor, without reading weights.

        Its tokenizer's `model_max_length` is what the model has positions for. It need not read images.

        Args:
            model_id: a folder, or a model on the hub.
            revision: branch, tag or commit on the hub.
        """
        raise NotImplementedError(f"{self.title} are loaded with their weights")

    def count_frame_tokens(self, processor: ProcessorMixin) -> int:
        """Return how many tokens of start and end `max_length` counts beside those of the caption."""
        return 1

    def control_ids(self, processor: ProcessorMixin) -> frozenset[int]:
        """Return the ids of the tokens whose names stay text where a caption spells them out."""
        from caption_train.families.caption_ids import control_ids

        return control_ids(processor.tokenizer)

    def check_prompt(self, prompt: str) -> None:  # noqa: B027  (most families read any prompt)
        """Raise UsageError for a prompt that no model of this family can read, before a model is loaded."""

    def check_inputs(self, processor: ProcessorMixin, prompts: Sequence[str]) -> None:
        """Raise UsageError for a prompt that this model cannot read: refused here, not in a data worker.

        prompts: all that a run will use, each once. By default the longest is tried.
        """
        from PIL import Image

        self.encode(processor, [Image.new("RGB", (32, 32))], [max(prompts, key=len)])

    def set_up(
        self, processor: ProcessorMixin, model_id: str, settings: Mapping[str, Any], prompts: Sequence[str]
    ) -> None:
        """Configure a processor that was just loaded, and try it: if it is damaged, it fails here.

        Args:
            processor: the processor.
            model_id: where it comes from, for messages.
            settings: what `configure` applies.
            prompts: all that a run will use, for `check_inputs`.

        Raises:
            CaptionTrainError: the processor does not work; UsageError for what `check_inputs` refuses.
        """
        from caption_train.system.damage import explaining_damage

        with explaining_damage(f"--model_id {model_id}: its processor or settings are damaged"):
            self.configure(processor, settings)
            self.check_inputs(processor, prompts)

    def measure_inputs(self, processor: ProcessorMixin, prompt: str) -> int:
        """Return how many bytes the model's inputs for one large image and its prompt have."""
        import torch
        from PIL import Image

        inputs = self.encode(processor, [Image.new("RGB", (2048, 2048))], [prompt])
        return sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))

    def configure(self, processor: ProcessorMixin, settings: Mapping[str, Any]) -> None:  # noqa: B027
        """Apply values of the flags in `settings` to a processor; None is the checkpoint's own."""

    def read_settings(self, processor: ProcessorMixin) -> dict[str, Any]:
        """Return the settings in effect, by flag, as an adapter's record keeps them for captioning."""
        return {}

    def find_side(self, processor: ProcessorMixin) -> int:
        """Return the larger side, in pixels, of the size that `reads_one_size` speaks of."""
        size = processor.image_processor.size
        return max(size["height"], size["width"])

    def describe_inputs(self, processor: ProcessorMixin) -> list[str]:
        """Return lines on what the model reads of an image, such as how many tokens it takes."""
        return []

    def write_conversation(
        self, image: Image.Image, prompt: str, settings: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the messages that ask a served model for a caption, in the form of OpenAI's chat API."""
        raise UsageError(f"--endpoint: {self.title} is not captioned with through a server")

    def parse_answer(self, text: str, prompt: str, image_size: tuple[int, int]) -> Any:
        """Return the boxes in a generated text.

        Args:
            text: the generated text.
            prompt: the prompt that it answers.
            image_size: (width, height) of the image in pixels.

        Returns:
            Shapes and labels in pixels of the image; None if the answer is plain text.
        """
        return None

    def draw_answer(self, image: Image.Image, answer: Any) -> Image.Image:
        """Return a copy of `image` with what `parse_answer` found drawn on it."""
        raise UsageError(f"--visualize: {self.title} gives no boxes to draw")

    def convert_adapter(
        self, folder: Path | str, model: PreTrainedModel
    ) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
        """Convert an adapter that another tool saved.

        Args:
            folder: the adapter's folder.
            model: the base model that it is for.

        Returns:
            PEFT's config and weights; None if the adapter is in PEFT's layout for this model already.
        """
        return None

    def prepare_merge(self, model: PeftModel) -> None:  # noqa: B027  (most adapters can be merged as they are)
        """Change what must be changed before the adapter of `model` can be merged into it."""

    def save_adapter(self, model: PreTrainedModel, source: Path | str, folder: Path, *, legacy: bool) -> None:
        """Write an adapter in the family's other layout.

        Args:
            model: the base model that the adapter fits.
            source: the adapter's folder.
            folder: the folder to write to.
            legacy: whether to write the names of the legacy layout or of the native one.

        Raises:
            UsageError: the adapter is in this layout already, or the family has only one.
        """
        raise UsageError(f"{source} is {self.title}'s only layout already; --merge writes the model")

    def save_legacy(self, model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
        """Write the model in the family's legacy layout, which its authors' own code loads."""
        raise UsageError(f"--layout legacy: {self.title} has one layout only")

    def save_processor(self, processor: ProcessorMixin, folder: Path) -> None:
        """Write what `AutoProcessor` needs to load the processor from `folder`."""
        processor.save_pretrained(folder)

    def find_stored_dtype(self, model_id: str, revision: str | None = None) -> torch.dtype:
        """Return the precision of the checkpoint's weights: merged and exported models are written in it."""
        import torch

        return torch.float32

"""Any image-text-to-text model, by its own processor and chat template. No torch until a verb runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caption_train.families.base import Batch, Family, Generated, ModelFacts
from caption_train.families.loading import guarding_load
from caption_train.families.presets import PRESETS
from caption_train.families.vlm.presets import DEFAULT_PROMPT

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image
    from transformers import PreTrainedModel

    from caption_train.families.image_encoder import ImageEncoder, Picture, Tensors
    from caption_train.families.vlm.processor import VlmProcessor


class Vlm(Family):
    """Image-text-to-text models: Qwen-VL, LLaVA and JoyCaption, Gemma, SmolVLM, PaliGemma, InternVL, …

    The prompt and where the answer begins come from the checkpoint's chat template, parts and LoRA targets
    from its config.
    """

    name = "vlm"
    title = "image-text-to-text models"
    training_script = "train_vlm_lora.py"
    inference_script = "inference_vlm.py"
    model_id = None
    example_model = "Qwen/Qwen3-VL-2B-Instruct"
    facts = ModelFacts((), {}, DEFAULT_PROMPT)
    train_defaults = {"train_parts": ["language"]}
    presets = PRESETS
    settings = ("system_prompt", "max_pixels")
    has_recordable_steps = True
    can_be_served = True
    plans_without_weights = True
    keeps_features = True
    kept_parts = ("vision", "projector")
    features_vary = True

    @guarding_load
    def describe(self, model_id: str, revision: str | None = None) -> ModelFacts:
        """Return parts, LoRA targets and the default prompt of a checkpoint; see `Family.describe`."""
        from caption_train.families.vlm.checkpoint import find_folder
        from caption_train.families.vlm.parts import read_facts

        return read_facts(find_folder(model_id, revision), model_id)

    def write_conversation(
        self, image: Image.Image, prompt: str, settings: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return messages with the image in a data URL; see `Family.write_conversation`."""
        from caption_train.families.vlm.served import write_conversation

        return write_conversation(image, prompt, settings)

    def check_inputs(self, processor: VlmProcessor, prompts: Sequence[str]) -> None:
        """Refuse special tokens in any prompt, and a prompt that is too long; see `Family.check_inputs`."""
        for prompt in prompts:
            processor.render(prompt)
        super().check_inputs(processor, prompts)

    def configure(self, processor: VlmProcessor, settings: Mapping[str, Any]) -> None:
        """Set system prompt and largest image; see `Family.configure`."""
        from caption_train.families.vlm.image_budget import bound_images

        asked = settings.get("system_prompt")
        processor.system_prompt = processor.own_prompts["system_prompt"] if asked is None else asked
        bound = bound_images(processor, settings.get("max_pixels"))
        processor.settings = {"system_prompt": processor.system_prompt, "max_pixels": bound}

    def describe_inputs(self, processor: VlmProcessor) -> list[str]:
        """Return a line on how many tokens an image takes; see `Family.describe_inputs`."""
        from caption_train.families.vlm.image_budget import describe_budget

        return [describe_budget(processor, processor.settings.get("max_pixels"))]

    def read_settings(self, processor: VlmProcessor) -> dict[str, Any]:
        """Return the settings in effect; see `Family.read_settings`."""
        return processor.settings

    @guarding_load
    def load(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantization_config: Any = None,
    ) -> tuple[PreTrainedModel, VlmProcessor]:
        """Load model and processor; see `Family.load`. The processor and its template are checked first."""
        import torch

        from caption_train.families.loading import load_model
        from caption_train.families.vlm.checkpoint import find_folder, find_model_class
        from caption_train.families.vlm.processor import load_processor

        folder = find_folder(model_id, revision)
        config, model_class = find_model_class(folder, model_id)
        processor = load_processor(folder, config, model_class, model_id)
        model = load_model(
            model_class,
            model_id,
            config=config,
            revision=revision,
            dtype=dtype or torch.float32,
            quantization_config=quantization_config,
        )
        return model, processor

    @guarding_load
    def load_empty(
        self, model_id: str, *, revision: str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[PreTrainedModel, VlmProcessor]:
        """Return an empty model and the processor; see `Family.load_empty`. No weights are read."""
        from caption_train.families.vlm.checkpoint import find_folder, find_model_class
        from caption_train.families.vlm.parts import make_empty_model
        from caption_train.families.vlm.processor import load_processor

        folder = find_folder(model_id, revision)
        config, model_class = find_model_class(folder, model_id)
        processor = load_processor(folder, config, model_class, model_id)
        return make_empty_model(config, model_class, dtype), processor

    @guarding_load
    def load_text_processor(self, model_id: str, *, revision: str | None = None) -> VlmProcessor:
        """Return the processor; see `Family.load_text_processor`."""
        from caption_train.families.vlm.checkpoint import find_folder, find_model_class
        from caption_train.families.vlm.processor import load_processor

        folder = find_folder(model_id, revision)
        return load_processor(folder, *find_model_class(folder, model_id), model_id)

    def count_frame_tokens(self, processor: VlmProcessor) -> int:
        """Return how many tokens end an answer of this checkpoint."""
        return len(processor.chat.end_ids)

    def control_ids(self, processor: VlmProcessor) -> frozenset[int]:
        """Return the ids of the tokens that conversations are made of; see `Family.control_ids`."""
        from caption_train.families.vlm.chat import list_control_ids

        return list_control_ids(processor.tokenizer, processor.chat)

    def encode(self, processor: VlmProcessor, images: Sequence[Image.Image], prompts: Sequence[str]) -> Batch:
        """Return the processor's batch, text on the left padded to [B, T]; see `Family.encode`."""
        from caption_train.families.vlm.collator import encode

        return encode(processor, images, prompts)

    def find_image_encoder(self, model: PreTrainedModel) -> ImageEncoder:
        """Return image encoder and projector; see `Family.find_image_encoder`."""
        from caption_train.families.vlm.features.encoder import find_image_encoder

        return find_image_encoder(model)

    def hold_image(self, path: Path, image: Image.Image | None, features: Tensors) -> Picture:
        """Return the image with its size, which is all that is needed of it if its features are kept."""
        from caption_train.families.vlm.features.pictures import hold_image

        return hold_image(path, image, features)

    def keep_images(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return the batch as it is: images that are no `SINGLES` are all encoded, by the model itself."""
        return batch

    def weigh_image(self, processor: VlmProcessor, size: tuple[int, int]) -> float:
        """Return how many tokens an image has; see `Family.weigh_image`."""
        from caption_train.families.vlm.image_budget import count_image_tokens

        return count_image_tokens(processor, size)

    def make_collator(
        self, processor: VlmProcessor, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return the training collator; see `Family.make_collator`."""
        from caption_train.families.vlm.collator import VlmCollator

        return VlmCollator(processor, prompt, max_length, processor.keeps_logits)

    def tokenize_caption(self, processor: VlmProcessor, caption: str) -> list[int]:
        """Return a caption's ids as they follow the prompt; see `Family.tokenize_caption`."""
        from caption_train.families.vlm.chat import answer_ids

        return answer_ids(processor.tokenizer, processor.chat, caption)

    def generate(
        self, model: PreTrainedModel, processor: VlmProcessor, batch: Batch, **settings: Any
    ) -> list[Generated]:
        """Caption a batch; see `Family.generate`. The checkpoint's own settings may sample: not here."""
        from caption_train.families.vlm.generation import generate

        return generate(model, processor, batch, settings)

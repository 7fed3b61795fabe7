"""The Florence-2 family: a DaViT, and a BART that reads the image features before the prompt.

torch is imported only inside methods, so that `--help` starts fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError
from caption_train.families.base import Batch, Family, Generated, ModelFacts
from caption_train.families.florence.answers import Answer, parse_answer
from caption_train.families.florence.tasks import (
    TASKS,
    check_prompt,
    expand_prompt,
    find_task,
    refuse_token,
)
from caption_train.families.image_encoder import ImageEncoder
from caption_train.families.loading import check_transformers, guarding_load

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import LoraConfig, PeftModel
    from PIL import Image
    from transformers import Florence2ForConditionalGeneration, Florence2Processor


class Florence(Family):
    """Florence-2 in transformers' own class. The encoder reads image tokens, `<s>`, the prompt and `</s>`."""

    name = "florence"
    title = "Florence-2"
    training_script = "train_florence_lora.py"
    inference_script = "inference_florence.py"
    model_id = "microsoft/Florence-2-base-ft"
    base_models = (
        *("microsoft/Florence-2-base-ft", "microsoft/Florence-2-large-ft"),
        *("microsoft/Florence-2-large", "microsoft/Florence-2-base"),
    )
    facts = ModelFacts(
        lora_target_modules=("qkv", "proj", "k_proj", "v_proj", "q_proj", "out_proj"),
        parts={
            "vision": r"model\.vision_tower(\..*)?",
            "projector": r"model\.multi_modal_projector(\..*)?",
            "language": r"(model\.language_model|lm_head)(\..*)?",
        },
        default_prompt="<CAPTION>",
    )
    tasks = tuple(TASKS)
    has_recordable_steps = True
    presets = {"descriptive": "<MORE_DETAILED_CAPTION>", "short": "<CAPTION>"}
    draws_answers = True
    converts_checkpoints = True
    has_legacy_layout = True
    keeps_features = True
    reads_one_size = True
    load_elsewhere = (
        "Plain transformers and PEFT load it on a base in transformers' layout, which Microsoft's "
        "repositories are not: `python export_adapter.py {base} florence-native/` writes one, "
        "`python export_adapter.py . merged/ --merge` base and LoRA as one model."
    )

    @guarding_load
    def load(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantization_config: Any = None,
    ) -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
        """Load a Florence-2; see `Family.load`."""
        import torch

        from caption_train.families.florence.files import find_checkpoint
        from caption_train.families.florence.legacy.load import load_legacy, load_native
        from caption_train.families.prompt_length import note_positions

        check_transformers()
        checkpoint = find_checkpoint(model_id, revision)
        if checkpoint.is_legacy and self.cache_converted:
            from caption_train.families.florence.legacy.cache import use_native_copy

            checkpoint = use_native_copy(checkpoint)
        load = load_legacy if checkpoint.is_legacy else load_native
        model, processor = load(
            checkpoint, dtype=dtype or torch.float32, quantization_config=quantization_config
        )
        note_positions(model.config, processor)
        return model, processor

    @guarding_load
    def load_text_processor(self, model_id: str, *, revision: str | None = None) -> Any:
        """Return the processor, of a legacy checkpoint its tokenizer; see `Family.load_text_processor`."""
        from caption_train.families.florence.legacy.load import load_text_processor

        check_transformers()
        return load_text_processor(model_id, revision)

    def count_frame_tokens(self, processor: Florence2Processor) -> int:
        """Return 2: `<s>` and `</s>`."""
        return 2

    def control_ids(self, processor: Florence2Processor) -> frozenset[int]:
        """Return the ids of `</s>` and its like; see `Family.control_ids`.

        `<loc_12>`, `<poly>` and their like are not among them: answers with places consist of them.
        """
        from caption_train.families.caption_ids import named_ids

        tokenizer = processor.tokenizer
        return named_ids(tokenizer) | {tokenizer.convert_tokens_to_ids(processor.image_token)}

    def encode(
        self, processor: Florence2Processor, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Batch:
        """Return `pixel_values` [B, 3, H, W], and `input_ids`, `attention_mask` [B, T] of image and text."""
        from caption_train.families.prompt_length import check_prompt_length

        texts = [expand_prompt(prompt) for prompt in prompts]
        for text in texts:
            refuse_token(processor.image_token, text)
        batch = processor(
            text=texts,
            images=list(images),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            verbose=False,
        )
        check_prompt_length(batch["input_ids"].shape[1], processor)
        return {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}

    def find_image_encoder(self, model: Any) -> ImageEncoder:
        """Return the vision tower; see `Family.find_image_encoder`."""
        return ImageEncoder(model.model.vision_tower, "forward", [model.model.vision_tower])

    def make_collator(
        self, processor: Florence2Processor, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return the training collator; see `Family.make_collator`."""
        if max_length < 3:
            raise UsageError(f"--max_length must be 3 or more, <s>, a word and </s>, not {max_length}")
        return FlorenceCollator(processor, prompt, max_length)

    def generate(
        self,
        model: Florence2ForConditionalGeneration,
        processor: Florence2Processor,
        batch: Batch,
        **settings: Any,
    ) -> list[Generated]:
        """Generate captions for a batch; see `Family.generate`.

        The checkpoint's `forced_eos_token_id` puts an end token at the token limit as well. A caption that
        ends exactly there counts as cut, because its end token says nothing.
        """
        from caption_train.families.decoding.beams import sharing_image
        from caption_train.families.decoding.leaving import letting_rows_leave
        from caption_train.families.prompt_length import limit_new_tokens

        defaults = model.generation_config
        settings = limit_new_tokens(settings, model.config.text_config, used=1)
        if settings.get("num_beams", defaults.num_beams) in (None, 1):
            settings = {"early_stopping": False, **settings}  # transformers warns of it without beams
        with (
            sharing_image(model, settings, defaults, r".*\.encoder_attn\.[kv]_proj") as settings,
            letting_rows_leave(model, settings) as settings,
        ):
            sequences = model.generate(**batch, **settings)
        forced = settings.get("forced_eos_token_id", defaults.forced_eos_token_id) is not None
        limit = settings.get("max_new_tokens") if forced else None
        return [_to_generated(processor, sequence[1:], limit) for sequence in sequences.tolist()]

    def check_prompt(self, prompt: str) -> None:
        """Raise UsageError for a prompt that no Florence-2 can read, before a model is loaded."""
        check_prompt(prompt)

    def parse_answer(self, text: str, prompt: str, image_size: tuple[int, int]) -> Answer | None:
        """Parse a generated text; see `Family.parse_answer`.

        Returns None for tasks that are answered in text, and for prompts without a task token.
        """
        task = find_task(prompt)
        return task and parse_answer(text, task, image_size)

    def draw_answer(self, image: Image.Image, answer: Answer) -> Image.Image:
        """Return a copy of `image` with the shapes and labels that `parse_answer` found."""
        from caption_train.families.florence.drawing import draw_answer

        return draw_answer(image, answer)

    def convert_adapter(
        self, folder: Path | str, model: Florence2ForConditionalGeneration
    ) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
        """Convert an adapter of Microsoft's remote code; None if native. See `Family.convert_adapter`."""
        from caption_train.families.florence.legacy.adapter import convert_adapter

        return convert_adapter(folder, model)

    def prepare_merge(self, model: PeftModel) -> None:
        """Make an adapter mergeable: a tied head that the adapter changes gets its own weights."""
        from caption_train.families.florence.legacy.export import prepare_merge

        prepare_merge(model)

    def save_adapter(
        self, model: Florence2ForConditionalGeneration, source: Path | str, folder: Path, *, legacy: bool
    ) -> None:
        """Write an adapter with the names of the other layout; see `Family.save_adapter`."""
        from caption_train.families.florence.legacy.export import save_adapter

        save_adapter(model, source, folder, legacy=legacy)

    def save_legacy(
        self, model: Florence2ForConditionalGeneration, processor: Florence2Processor, folder: Path
    ) -> None:
        """Write the model in the layout that Microsoft's remote code, and tools on transformers 4, load."""
        from caption_train.families.florence.legacy.export import save_legacy

        save_legacy(model, processor, folder)

    @guarding_load
    def find_stored_dtype(self, model_id: str, revision: str | None = None) -> torch.dtype:
        """Return the precision of the checkpoint's weights."""
        from caption_train.families.florence.files import find_checkpoint

        return find_checkpoint(model_id, revision).dtype


@dataclass
class FlorenceCollator:
    """Turns items into what `encode` returns, and `labels` [B, T]: `<s> caption </s>`, the official recipe.

    With the prompt `<CAPTION>`, the captions "a cat" and "a red dog" become

        input_ids (encoder)                                     labels (. is IGNORE_INDEX)
        <image> … <image> <s> What does the … ? </s>            <s> a cat </s> .
        <image> … <image> <s> What does the … ? </s>            <s> a red dog </s>

    The model makes the decoder's input itself: the labels shifted right, starting with `</s>`, from which
    `generate` starts too.

    Attributes:
        processor: the model's processor.
        prompt: the prompt of items without one of their own.
        max_length: limit of a row of labels in tokens, `<s>` and `</s>` included; the model's positions limit
            it as well.

    >>> from PIL import Image
    >>> from caption_train.families import get_family
    >>> processor = get_family("florence").load("examples/bases/florence2-tiny")[1]
    >>> collate = get_family("florence").make_collator(processor, prompt='<CAPTION>', max_length=16)
    >>> batch = collate([{"image": Image.new("RGB", (64, 64)), "caption": "a red square"}])
    >>> list(batch["input_ids"].shape), list(batch["labels"].shape)
    ([1, 18], [1, 5])
    >>> labels = batch["labels"][0]
    >>> processor.tokenizer.decode(labels[labels != -100])
    '<s>a red square</s>'
    """

    processor: Florence2Processor
    prompt: str
    max_length: int

    def __call__(self, items: Sequence[dict]) -> Batch:
        from caption_train.families.labels import pad_labels

        prompts = [item.get("prompt") or self.prompt for item in items]
        batch = Florence().encode(self.processor, [item["image"] for item in items], prompts)
        return batch | {"labels": pad_labels([self._label_ids(item["caption"]) for item in items])}

    def _label_ids(self, caption: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        room = min(self.max_length, tokenizer.model_max_length) - 2
        ids = Florence().tokenize_caption(self.processor, caption)[: max(room, 0)]
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def _to_generated(processor: Florence2Processor, ids: list[int], limit: int | None) -> Generated:
    """Make a result of the ids after the start token; at length `limit` the end token is forced."""
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token_id
    finished = end in ids
    ids = ids[: ids.index(end) + 1] if finished else ids
    # By id, so that a caption may spell out `</s>`; location tokens are special, and stay.
    left_out = {tokenizer.bos_token_id, end, tokenizer.pad_token_id}
    text = tokenizer.decode([id for id in ids if id not in left_out])
    return Generated(text.strip(), ids, finished and len(ids) != limit)

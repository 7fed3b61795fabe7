"""The Moondream 2 family: a SigLIP tower, and a Phi decoder that reads BOS, image and prompt.

torch is imported only inside methods, so that `--help` starts fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.families.base import Batch, Family, Generated, ModelFacts
from caption_train.families.image_encoder import ImageEncoder
from caption_train.families.loading import guarding_load
from caption_train.families.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from caption_train.families.moondream.model import MoondreamForConditionalGeneration
    from caption_train.families.moondream.processor import MoondreamProcessor


class Moondream(Family):
    """Moondream 2. The decoder reads BOS, image and prompt; the answer ends with EOS, which is BOS again."""

    name = "moondream"
    title = "Moondream 2"
    training_script = "train_moondream_lora.py"
    inference_script = "inference_moondream.py"
    model_id = "vikhyatk/moondream2"
    revision = "2025-06-21"
    base_models = (model_id,)
    facts = ModelFacts(
        lora_target_modules=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        parts={
            "vision": r"model\.vision_tower(\..*)?",
            "projector": r"model\.multi_modal_projector(\..*)?",
            "language": r"(model\.language_model|lm_head)(\..*)?",
        },
        default_prompt="normal",
    )
    train_defaults = {"train_parts": ["language"]}
    tasks = ("short", "normal", "long")
    presets = PRESETS | {"descriptive": "long", "short": "short"}
    has_legacy_layout = True
    keeps_features = True
    image_inputs = ("pixel_values", "tilings")

    @guarding_load
    def load(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantization_config: Any = None,
    ) -> tuple[MoondreamForConditionalGeneration, MoondreamProcessor]:
        """Load a Moondream 2 in an official layout or in the native one; see `Family.load`.

        revision: on the hub, a branch, tag or commit. For a folder, the release that its weights are from, if
        its config.json does not say.
        """
        import torch

        from caption_train.families.loading import explained, load_model
        from caption_train.families.moondream.files import read_tokenizer
        from caption_train.families.moondream.model import MoondreamForConditionalGeneration
        from caption_train.families.moondream.processor import MoondreamProcessor
        from caption_train.families.prompt_length import note_positions

        revision = self._release(model_id, revision)
        model = load_model(
            MoondreamForConditionalGeneration,
            model_id,
            revision=revision,
            dtype=dtype or torch.float32,
            quantization_config=quantization_config,
        )
        if (Path(model_id) / "processor_config.json").is_file():
            processor = MoondreamProcessor.from_pretrained(model_id)
        else:
            with explained(model_id):
                tokenizer = read_tokenizer(model_id, revision, model.config.bos_token_id)
            processor = MoondreamProcessor.from_config(model.config, tokenizer)
        note_positions(model.config, processor)
        return model, processor

    @guarding_load
    def load_text_processor(self, model_id: str, *, revision: str | None = None) -> MoondreamProcessor:
        """Return the processor; see `Family.load_text_processor`."""
        from caption_train.families.loading import load_config
        from caption_train.families.moondream.files import read_tokenizer
        from caption_train.families.moondream.model import MoondreamForConditionalGeneration
        from caption_train.families.moondream.processor import MoondreamProcessor
        from caption_train.families.prompt_length import note_positions

        revision = self._release(model_id, revision)
        config = load_config(MoondreamForConditionalGeneration, model_id, revision)
        if (Path(model_id) / "processor_config.json").is_file():
            processor = MoondreamProcessor.from_pretrained(model_id)
        else:
            tokenizer = read_tokenizer(model_id, revision, config.bos_token_id)
            processor = MoondreamProcessor.from_config(config, tokenizer)
        note_positions(config, processor)
        return processor

    def encode(
        self, processor: MoondreamProcessor, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Batch:
        """Return the batch of `MoondreamProcessor`: all images' crops in one list, and how each is tiled."""
        from caption_train.families.prompt_length import check_prompt_length

        batch = dict(processor(list(images), list(prompts)))
        check_prompt_length(batch["input_ids"].shape[1] + 2, processor)  # + 2: room for one word and EOS
        return batch

    def find_image_encoder(self, model: Any) -> ImageEncoder:
        """Return the tower with what joins an image's crops; see `Family.find_image_encoder`."""
        return ImageEncoder(model.model, "encode_crops", [model.model.vision_tower])

    def split_images(self, *inputs: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Return the crops and the tiling of each image; see `Family.split_images`."""
        from caption_train.families.moondream.layers import count_crops

        pixel_values, tilings = inputs
        crops = pixel_values.split(count_crops(tilings.tolist()))
        return [(image, tilings[row : row + 1]) for row, image in enumerate(crops)]

    def keep_images(self, batch: Batch, places: Sequence[int]) -> Batch:
        """Return the batch with the crops and tilings of some images; see `Family.keep_images`."""
        import torch

        images = self.split_images(batch["pixel_values"], batch["tilings"])
        crops = [images[place][0] for place in places] or [batch["pixel_values"][:0]]
        return batch | {"pixel_values": torch.cat(crops), "tilings": batch["tilings"][list(places)]}

    def make_collator(
        self, processor: MoondreamProcessor, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return the training collator; see `Family.make_collator`."""
        return MoondreamCollator(processor, prompt, max_length)

    def generate(
        self,
        model: MoondreamForConditionalGeneration,
        processor: MoondreamProcessor,
        batch: Batch,
        **settings: Any,
    ) -> list[Generated]:
        """Generate captions for a batch; see `Family.generate`."""
        from caption_train.families.decoding.leaving import letting_rows_leave
        from caption_train.families.prompt_length import limit_new_tokens

        settings = limit_new_tokens(settings, model.config.text_config, used=batch["input_ids"].shape[1])
        with letting_rows_leave(model, settings) as settings:
            sequences = model.generate(**batch, **settings)
        answers = sequences[:, batch["input_ids"].shape[1] :].tolist()
        return [_to_generated(processor, ids) for ids in answers]

    def save_legacy(
        self, model: MoondreamForConditionalGeneration, processor: MoondreamProcessor, folder: Path
    ) -> None:
        """Write the model in the layout that the official code loads."""
        from caption_train.families.moondream.legacy.checkpoint import write_legacy

        write_legacy(folder, model.config, model.state_dict(), processor.tokenizer)

    @guarding_load
    def find_stored_dtype(self, model_id: str, revision: str | None = None) -> torch.dtype:
        """Return the precision of the checkpoint's weights."""
        from caption_train.families.moondream.files import find_dtype

        return find_dtype(model_id, self._release(model_id, revision))

    def _release(self, model_id: str, revision: str | None) -> str | None:
        return self.revision if revision is None and model_id == self.model_id else revision


@dataclass
class MoondreamCollator:
    """Turns items into what `encode` returns, with caption and EOS after the prompt, and `labels` [B, T].

    With N image tokens per row, the captions "a cat" and "a red dog" become

        input_ids                                            labels (. is IGNORE_INDEX)
        BOS <image> × N [prompt] a cat EOS PAD               . . × N . a cat EOS .
        BOS <image> × N [prompt] a red dog EOS               . . × N . a red dog EOS

    `logits_to_keep` names the positions after the image. There is no loss before them, so the model need not
    compute [T, vocabulary] logits there.

    Attributes:
        processor: the model's processor.
        prompt: the prompt of items without one of their own.
        max_length: limit of caption and EOS in tokens.

    >>> from PIL import Image
    >>> from caption_train.families import get_family
    >>> processor = get_family("moondream").load("examples/bases/moondream-tiny")[1]
    >>> collate = get_family("moondream").make_collator(processor, prompt='normal', max_length=16)
    >>> batch = collate([{"image": Image.new("RGB", (64, 64)), "caption": "a red square"}])
    >>> list(batch["input_ids"].shape), list(batch["labels"].shape)
    ([1, 19], [1, 19])
    >>> labels = batch["labels"][0]
    >>> processor.tokenizer.decode(labels[labels != -100])
    'a red square<|endoftext|>'
    """

    processor: MoondreamProcessor
    prompt: str
    max_length: int

    def __call__(self, items: Sequence[dict]) -> Batch:
        import torch

        from caption_train.families.labels import IGNORE_INDEX

        prompts = [item.get("prompt") or self.prompt for item in items]
        answers = [
            self._answer_ids(prompt, item["caption"]) for prompt, item in zip(prompts, items, strict=True)
        ]
        batch = dict(self.processor([item["image"] for item in items], prompts, answers))
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        # With answers, padding is at the end, so each answer ends at the row's length.
        for label, ids, length, answer in zip(labels, batch["input_ids"], lengths, answers, strict=True):
            label[length - len(answer) : length] = ids[length - len(answer) : length]
        first = self.processor.image_seq_length
        return batch | {"labels": labels, "logits_to_keep": torch.arange(first, labels.shape[1])}

    def _answer_ids(self, prompt: str, caption: str) -> list[int]:
        from caption_train.families.prompt_length import check_prompt_length

        tokenizer = self.processor.tokenizer
        used = 1 + self.processor.image_seq_length + len(self.processor.prompt_ids(prompt))
        check_prompt_length(used + 2, self.processor)
        most = min(self.max_length, tokenizer.model_max_length - used)
        return [*self.processor.text_ids(caption)[: most - 1], tokenizer.eos_token_id]


def _to_generated(processor: MoondreamProcessor, ids: list[int]) -> Generated:
    end = processor.tokenizer.eos_token_id
    finished = end in ids
    ids = ids[: ids.index(end) + 1] if finished else ids
    return Generated(processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, finished)

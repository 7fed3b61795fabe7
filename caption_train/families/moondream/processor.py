"""Turns images and prompts into model inputs: `[BOS] [N image tokens] [prompt] [answer] [EOS]`.

The tokenizer has no image token and adds no tokens itself. Templates are token ids that depend on the
release.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from caption_train.errors import UsageError
from caption_train.families.caption_ids import caption_ids
from caption_train.families.moondream.config import MoondreamConfig, find_release, native_dict
from caption_train.families.moondream.files import read_tokenizer
from caption_train.families.moondream.image_processor import (
    Images,
    MoondreamImageProcessor,
    list_images,
)

CAPTION_TASKS = ("short", "normal", "long")


class MoondreamProcessor(ProcessorMixin):
    """The processor. A prompt is a caption task (`short`, `normal`, `long`) or a question in plain words."""

    def __init__(
        self,
        image_processor: MoondreamImageProcessor,
        tokenizer: Any,
        image_token_id: int = 51199,
        image_seq_length: int = 729,
        templates: dict | None = None,
        question_space: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.templates = templates or MoondreamConfig().templates
        self.question_space = question_space

    @classmethod
    def from_config(cls, config: MoondreamConfig, tokenizer: Any) -> MoondreamProcessor:
        """Make the processor for a model with this config."""
        image_processor = MoondreamImageProcessor(
            crops=config.crops,
            crop_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            overlap_margin=config.overlap_margin,
            max_crops=config.max_crops,
        )
        return cls(
            image_processor,
            tokenizer,
            image_token_id=config.image_token_id,
            image_seq_length=config.image_seq_length,
            templates=config.templates,
            question_space=config.question_space,
        )

    @classmethod
    def from_pretrained(cls, folder: str, **kwargs: Any) -> MoondreamProcessor:
        """Load what `save_pretrained` wrote, or make the processor of an official checkpoint."""
        from transformers import PreTrainedTokenizerFast

        kwargs.pop("backend", None)
        settings, _ = cls.get_processor_dict(folder, **kwargs)
        if "image_token_id" not in settings:
            return cls._from_official(folder, **kwargs)
        names = ("image_token_id", "image_seq_length", "templates", "question_space")
        images = settings.get("image_processor") or {}
        crops = {key: value for key, value in images.items() if key != "image_processor_type"}
        return cls(
            MoondreamImageProcessor(**crops),
            PreTrainedTokenizerFast.from_pretrained(folder, **kwargs),
            **{name: settings[name] for name in names},
        )

    @classmethod
    def _from_official(cls, folder: str, revision: str | None = None, **kwargs: Any) -> MoondreamProcessor:
        official, _ = MoondreamConfig.get_config_dict(folder, revision=revision, **kwargs)
        config = MoondreamConfig(**native_dict(official, find_release(official, revision)))
        return cls.from_config(config, read_tokenizer(folder, revision, config.bos_token_id))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a caption task, or of a question inside the query template."""
        if prompt in CAPTION_TASKS or not prompt:
            ids = self.templates["caption"].get(prompt or "normal")
            if ids is None:
                raise UsageError(f"--task {prompt}: this revision of Moondream 2 has no such captions")
            return list(ids)
        question = " " + prompt if self.question_space else prompt
        query = self.templates["query"]
        return [*query["prefix"], *self.text_ids(question), *query["suffix"]]

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text, without any token added, and without one that it spells out."""
        return caption_ids(self.tokenizer, text)

    def __call__(
        self,
        images: Images | None = None,
        text: str | Sequence[str] | None = None,
        answers: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode images and prompts.

        An image object that is given several times is cut into crops only once.

        Args:
            images: one image per prompt, or one image for all prompts.
            text: a prompt or several; "normal" by default.
            answers: token ids to put after each prompt, for training.

        Returns:
            `input_ids` and `attention_mask` [B, T], `pixel_values` [C, 3, S, S], `tilings` [I, 2] and, if an
            image is used several times, `image_index` [B] with the image of each row.
        """
        if images is None:
            raise ValueError("Moondream 2 reads an image before every prompt: give images")
        images = list_images(images)
        text = ["normal"] * len(images) if text is None else [text] if isinstance(text, str) else list(text)
        if len(images) == 1:
            images *= len(text)
        if len(images) != len(text):
            raise ValueError(
                f"{len(images)} images, but {len(text)} prompts: give one image for every prompt"
            )
        places = {id(image): None for image in images}
        places = {key: place for place, key in enumerate(places)}
        unique = list({id(image): image for image in images}.values())
        batch = self.encode_ids([self.prompt_ids(prompt) for prompt in text], answers)
        batch |= self.image_processor.preprocess(unique, return_tensors="pt")
        if len(unique) < len(images):
            batch["image_index"] = torch.tensor([places[id(image)] for image in images])
        return BatchFeature(batch)

    def encode_ids(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Put BOS and image tokens before prompts and answers, and pad them.

        With answers, the padding is at the end. Without, it is between image and prompt, so that BOS and
        image have the same positions in every row, and all prompts end together.

        Args:
            prompts: token ids of each prompt.
            answers: token ids of each answer, if there are any.

        Returns:
            `input_ids` and `attention_mask` [B, T].
        """
        head = [self.tokenizer.bos_token_id, *[self.image_token_id] * self.image_seq_length]
        rows = (
            [[*p, *a] for p, a in zip(prompts, answers, strict=True)] if answers else list(map(list, prompts))
        )
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), len(head) + width), self.tokenizer.pad_token_id)
        input_ids[:, : len(head)] = torch.tensor(head)
        attention_mask = torch.zeros_like(input_ids)
        attention_mask[:, : len(head)] = 1
        for row, (ids, mask) in zip(rows, zip(input_ids, attention_mask, strict=True), strict=True):
            start = len(head) if answers else len(ids) - len(row)
            ids[start : start + len(row)] = torch.tensor(row)
            mask[start : start + len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoProcessor.register(MoondreamConfig, MoondreamProcessor, exist_ok=True)

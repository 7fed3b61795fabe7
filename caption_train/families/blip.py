"""The BLIP family: a ViT, and a BERT decoder that reads the image through cross-attention.

torch is imported only inside methods, so that `--help` starts fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.base import Batch, Family, Generated, ModelFacts
from caption_train.families.image_encoder import ImageEncoder
from caption_train.families.loading import guarding_load

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.modeling_blip import BlipAttention


_IMAGE_PROJECTIONS = r".*\.crossattention\.self\.(key|value)"


class Blip(Family):
    """BLIP captioning. The decoder starts from `[DEC]`, reads the prompt if there is one, ends at `[SEP]`."""

    name = "blip"
    title = "BLIP"
    training_script = "train_blip_network.py"
    inference_script = "inference.py"
    model_id = "Salesforce/blip-image-captioning-base"
    base_models = (model_id, "Salesforce/blip-image-captioning-large")
    facts = ModelFacts(
        lora_target_modules=(
            *("self.query", "self.key", "self.value", "output.dense"),
            *("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"),
        ),
        parts={
            "vision": r"vision_model\..*",
            "projector": r"text_decoder\..*\.crossattention\.self\.(key|value)",
            "language": r"text_decoder\.(?!.*\.crossattention\.self\.(key|value)).*",
        },
        default_prompt="",
    )
    train_defaults = {"learning_rate": 1e-3, "batch_size": 2}
    keeps_features = True
    reads_one_size = True

    @guarding_load
    def load(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        quantization_config: Any = None,
    ) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
        """Load a BLIP captioner; see `Family.load`."""
        import torch
        from transformers import BlipForConditionalGeneration, BlipProcessor

        from caption_train.families.loading import load_model, load_processor
        from caption_train.families.prompt_length import note_positions

        model = load_model(
            BlipForConditionalGeneration,
            model_id,
            revision=revision,
            dtype=dtype or torch.float32,
            quantization_config=quantization_config,
        )
        processor = load_processor(BlipProcessor.from_pretrained, model_id, revision=revision)
        _name_start_token(model.config, processor)
        note_positions(model.config, processor)
        return model, processor

    @guarding_load
    def load_text_processor(self, model_id: str, *, revision: str | None = None) -> BlipProcessor:
        """Return the processor; see `Family.load_text_processor`."""
        from transformers import BlipForConditionalGeneration, BlipProcessor

        from caption_train.families.loading import load_config, load_processor
        from caption_train.families.prompt_length import note_positions

        config = load_config(BlipForConditionalGeneration, model_id, revision)
        processor = load_processor(BlipProcessor.from_pretrained, model_id, revision=revision)
        _name_start_token(config, processor)
        note_positions(config, processor)
        return processor

    def encode(
        self, processor: BlipProcessor, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Batch:
        """Return `pixel_values` [B, 3, H, W], and `[DEC] prompt [SEP]` as `input_ids` with mask [B, T]."""
        from caption_train.families.prompt_length import check_prompt_length

        rows = [_text_ids(processor, prompt, "") for prompt in prompts]
        check_prompt_length(max(map(len, rows)) + 1, processor)  # + 1 leaves room for one word
        pixel_values = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, **_pad_text(processor, rows)}

    def make_collator(
        self, processor: BlipProcessor, *, prompt: str, max_length: int
    ) -> Callable[[Sequence[dict]], Batch]:
        """Return the training collator; see `Family.make_collator`."""
        return BlipCollator(processor, prompt, max_length)

    def generate(
        self, model: BlipForConditionalGeneration, processor: BlipProcessor, batch: Batch, **settings: Any
    ) -> list[Generated]:
        """Generate captions for a batch; see `Family.generate`.

        Rows are grouped by the length of their prompts, because the decoder starts after the last token of
        all rows. As in BLIP's own `generate`, the `[SEP]` of the prompt is left out.
        """
        from caption_train.families.decoding.beams import sharing_image
        from caption_train.families.decoding.leaving import letting_rows_leave
        from caption_train.families.prompt_length import limit_new_tokens

        decoder = model.text_decoder
        config, lengths = model.config.text_config, batch["attention_mask"].sum(dim=1)
        images = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        results: list[Generated | None] = [None] * len(lengths)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            given = {"eos_token_id": config.sep_token_id, "pad_token_id": config.pad_token_id}
            given |= limit_new_tokens(settings, config, used=length - 1)
            given["logits_processor"] = _find_processors(settings, rows.tolist())
            with (
                sharing_image(decoder, given, decoder.generation_config, _IMAGE_PROJECTIONS) as given,
                letting_rows_leave(decoder, given) as given,
            ):
                # Without a mask for the image, which BLIP's layers would not look at.
                sequences = decoder.generate(
                    input_ids=batch["input_ids"][rows, : length - 1],
                    attention_mask=batch["attention_mask"][rows, : length - 1],
                    encoder_hidden_states=images[rows],
                    **given,
                )
            for row, sequence in zip(rows.tolist(), sequences.tolist(), strict=True):
                results[row] = _to_generated(processor, sequence[length - 1 :])
        return results

    def find_image_encoder(self, model: Any) -> ImageEncoder:
        """Return the vision tower; see `Family.find_image_encoder`."""
        return ImageEncoder(model.vision_model, "forward", [model.vision_model])

    def speed_up(self, model: BlipForConditionalGeneration) -> None:
        """Have the vision tower use torch's fused attention; see `Family.speed_up`.

        transformers has only the plain one for BLIP. It writes the weights of all 577 × 577 pairs of patches
        to memory, several times in a layer: on a CPU a quarter of the tower's time.
        """
        super().speed_up(model)
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.forward = partial(_attend, layer.self_attn)


@dataclass
class BlipCollator:
    """Turns items into `pixel_values` [B, 3, H, W] and `input_ids`, `attention_mask`, `labels` [B, T].

    With the prompt "a photo of", the captions "a cat" and "a red dog" become

        input_ids                                          labels (. is IGNORE_INDEX)
        [DEC] a photo of a cat [SEP] [PAD]                 . . . . a cat [SEP] .
        [DEC] a photo of a red dog [SEP]                   . . . . a red dog [SEP]

    The model shifts the labels itself. The first token is `[DEC]`, from which `generate` starts, not the
    `[CLS]` that the tokenizer would put there.

    Attributes:
        processor: the model's processor.
        prompt: the prompt of items without one of their own.
        max_length: limit of caption and `[SEP]` in tokens.

    >>> from PIL import Image
    >>> from caption_train.families import get_family
    >>> processor = get_family("blip").load("examples/bases/blip-tiny")[1]
    >>> collate = get_family("blip").make_collator(processor, prompt='', max_length=16)
    >>> batch = collate([{"image": Image.new("RGB", (64, 64)), "caption": "a red square"}])
    >>> list(batch["pixel_values"].shape), list(batch["input_ids"].shape)
    ([1, 3, 96, 96], [1, 5])
    >>> labels = batch["labels"][0]
    >>> processor.tokenizer.decode(labels[labels != -100])
    'a red square [SEP]'
    """

    processor: BlipProcessor
    prompt: str
    max_length: int

    def __call__(self, items: Sequence[dict]) -> Batch:
        from caption_train.families.labels import IGNORE_INDEX

        prompts = [item.get("prompt") or self.prompt for item in items]
        batch = Blip().encode(self.processor, [item["image"] for item in items], prompts)
        rows = [
            _text_ids(self.processor, prompt, item["caption"], self.max_length)
            for prompt, item in zip(prompts, items, strict=True)
        ]
        # [DEC] and the prompt, without the [SEP] that `encode` puts after them.
        prompt_lengths = batch["attention_mask"].sum(dim=1) - 1
        batch |= _pad_text(self.processor, rows)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        for label, length in zip(labels, prompt_lengths.tolist(), strict=True):
            label[:length] = IGNORE_INDEX
        return batch | {"labels": labels}


def _attend(
    attention: BlipAttention, hidden_states: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `BlipAttention.forward` does for `hidden_states` [B, T, D], without the weights.

    `qkv` and `projection` are called as modules, so that a LoRA on them counts. There is no dropout.
    """
    from torch.nn.functional import scaled_dot_product_attention

    batch, tokens, width = hidden_states.shape
    split = attention.qkv(hidden_states).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = split.permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product_attention(query, key, value, scale=attention.scale)
    return attention.projection(mixed.transpose(1, 2).reshape(batch, tokens, width)), None


def _text_ids(
    processor: BlipProcessor, prompt: str, caption: str, max_length: int | None = None
) -> list[int]:
    """Return `[DEC] prompt caption [SEP]`; with `max_length`, it fits into the model's positions.

    Caption and `[SEP]` take at most `max_length` tokens.
    """
    from caption_train.families.caption_ids import caption_ids

    tokenizer = processor.tokenizer
    before, after = caption_ids(tokenizer, prompt), caption_ids(tokenizer, caption)
    if max_length is not None:
        room = tokenizer.model_max_length - 1 - len(before)
        after = after[: min(max_length, room) - 1]
    return [tokenizer.bos_token_id, *before, *after, tokenizer.sep_token_id]


def _name_start_token(config: BlipConfig, processor: BlipProcessor) -> None:
    """Make `[DEC]`, from which the decoder starts, the tokenizer's `bos_token`.

    The tokenizers on the hub are BERT's and do not know it. Its id, the first after their vocabulary, is only
    in the config.
    """
    tokenizer, start = processor.tokenizer, config.text_config.bos_token_id
    name = "[DEC]" if start == len(tokenizer) else tokenizer.convert_ids_to_tokens(start)
    tokenizer.add_special_tokens({"bos_token": name})
    if tokenizer.bos_token_id != start:
        raise CaptionTrainError(
            f"the tokenizer has {len(tokenizer)} entries, but the decoder starts from {start}"
        )


def _pad_text(processor: BlipProcessor, rows: list[list[int]]) -> Batch:
    padded = processor.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}


def _find_processors(settings: Mapping[str, Any], rows: Sequence[int]) -> list[Any]:
    """Return the logits processors of the settings, for some rows of the batch."""
    given = settings.get("logits_processor") or ()
    return [processor.for_rows(rows) if hasattr(processor, "for_rows") else processor for processor in given]


def _to_generated(processor: BlipProcessor, ids: list[int]) -> Generated:
    end = processor.tokenizer.sep_token_id
    finished = end in ids
    ids = ids[: ids.index(end) + 1] if finished else ids
    text = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Generated(text, ids, finished)

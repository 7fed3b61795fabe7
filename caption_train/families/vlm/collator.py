"""Training rows: what generation reads, then the caption and its end. Legend: B images, T tokens, K ≤ T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caption_train.families.base import Batch
from caption_train.families.image_encoder import Picture
from caption_train.families.vlm.chat import answer_ids
from caption_train.families.vlm.features.pictures import encode_pictures
from caption_train.families.vlm.images import encode_fitting, is_text

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from caption_train.families.vlm.processor import VlmProcessor


def encode(processor: VlmProcessor, images: Sequence[Image.Image | Picture], prompts: Sequence[str]) -> Batch:
    """Return what the model reads of B images and prompts, the text left-padded to [B, T].

    Pictures, of a run that keeps features, are encoded one by one: see `encode_pictures`.

    Raises:
        UsageError: the prompt leaves no position for a caption, however small the image.
        CaptionTrainError: an image that no processor can read.
    """
    if any(isinstance(image, Picture) for image in images):
        return encode_pictures(processor, images, prompts)
    return encode_fitting(processor, images, prompts)[0]


@dataclass
class VlmCollator:
    """Items → `encode`'s batch with caption and end after the prompt, `labels` [B, T] on those alone.

    Rows are padded on the left, as in generation, so that all captions stand in the last K columns: where the
    model can, only those get logits (`logits_to_keep`, `shift_labels` [B, K]), instead of [B, T, vocabulary].

    For instance, with the prompt P P P, captions "x y" and "z" and the end E:

        input_ids   P P P x y E        labels   - - - x y E        shift_labels   x y E -
                    . P P P z E                 - - - - z E                       - z E -

    keeps_logits: whether the model takes `logits_to_keep` and `shift_labels`.

    >>> from PIL import Image
    >>> from caption_train.families import get_family
    >>> processor = get_family("vlm").load("examples/bases/vlm-tiny")[1]
    >>> collate = get_family("vlm").make_collator(processor, prompt='Describe.', max_length=16)
    >>> batch = collate([{"image": Image.new("RGB", (64, 64)), "caption": "a red square"}])
    >>> list(batch["input_ids"].shape), list(batch["shift_labels"].shape)
    ([1, 23], [1, 5])
    >>> labels = batch["labels"][0]
    >>> processor.tokenizer.decode(labels[labels != -100])
    'a red square<|im_end|>'
    """

    processor: VlmProcessor
    prompt: str
    max_length: int
    keeps_logits: bool = False

    def __call__(self, items: Sequence[dict]) -> Batch:
        import torch

        from caption_train.families.labels import IGNORE_INDEX

        prompts = [item.get("prompt") or self.prompt for item in items]
        batch = encode(self.processor, [item["image"] for item in items], prompts)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        answers = [self._answer(item["caption"], length) for item, length in zip(items, lengths, strict=True)]
        batch = extend_rows(batch, answers, self.processor.chat.fills, self.processor.tokenizer.pad_token_id)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for label, answer in zip(labels, answers, strict=True):
            label[-len(answer) :] = torch.tensor(answer)
        batch["labels"] = labels
        if self.keeps_logits:
            batch |= keep_last(labels, max(map(len, answers)))
        return batch

    def _answer(self, caption: str, used: int) -> list[int]:
        """Return caption and end, at most `max_length` and what the model has positions for."""
        tokenizer, chat = self.processor.tokenizer, self.processor.chat
        most = min(self.max_length, tokenizer.model_max_length - used) - len(chat.end_ids)
        return [*answer_ids(tokenizer, chat, caption)[: max(most, 0)], *chat.end_ids]


def extend_rows(
    batch: Batch, answers: Sequence[Sequence[int]], fills: Mapping[str, int], pad_id: int
) -> Batch:
    """Return a left-padded batch with an answer after each prompt, padded on the left again.

    Args:
        batch: `input_ids`, `attention_mask` and what else has a value for each token [B, T, …]; others,
            such as pixels, stay as they are.
        answers: B rows of ids.
        fills: the value of an answer's positions in other tensors, by name; where there is none, the last
            prompt token's (a mask over images, say, which the caption sees as the prompt does).
        pad_id: what `input_ids` are padded with; everything else with 0.
    """
    import torch

    mask = batch["attention_mask"].bool()
    rows = [torch.tensor(answer, dtype=torch.long) for answer in answers]
    width = max(int(kept.sum()) + len(row) for kept, row in zip(mask, rows, strict=True))
    extended = {}
    for name, tensor in batch.items():
        if not is_text(name, tensor, mask):
            extended[name] = tensor
            continue
        result = tensor.new_full((len(rows), width, *tensor.shape[2:]), pad_id if name == "input_ids" else 0)
        for target, values, kept, row in zip(result, tensor, mask, rows, strict=True):
            values = values[kept]
            if name == "input_ids":
                tail = row
            elif name in fills:
                tail = values.new_full((len(row), *values.shape[1:]), fills[name])
            else:
                tail = values[-1:].expand(len(row), *values.shape[1:])
            target[width - len(values) - len(row) :] = torch.cat([values, tail])
        extended[name] = result
    return extended


def keep_last(labels: torch.Tensor, longest: int) -> Batch:
    """Return `logits_to_keep` [K] and `shift_labels` [B, K] for answers of at most `longest` ids, K one more.

    The first position kept is the one before the longest answer: its logits predict the first token.
    """
    import torch

    from caption_train.families.labels import IGNORE_INDEX

    width = labels.shape[1]
    first = width - longest - 1
    shifted = torch.nn.functional.pad(labels[:, first + 1 :], (0, 1), value=IGNORE_INDEX)
    return {"logits_to_keep": torch.arange(first, width), "shift_labels": shifted}

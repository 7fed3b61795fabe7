"""Turns images and captions into training batches. Legend: B images per micro-batch, T tokens."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from caption_train.data.images import ImageError, open_image
from caption_train.data.pairs import Pair
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.labels import count_label_tokens
from caption_train.system.console import escape_unprintable
from caption_train.system.signals import ignore_in_worker
from caption_train.system.workers import hand_over
from caption_train.training.run.batch_plan import BatchPlan, Key


@dataclass
class MicroBatch:
    """What one process passes to the model at once.

    Attributes:
        inputs: keyword arguments of the model.
        files: the images in it.
        label_tokens: how many labels have a loss. 0 marks a filler, which keeps this process in step with
            others.
        errors: why images were left out.
    """

    inputs: dict[str, Any]
    files: list[str]
    label_tokens: int
    errors: list[str]

    def pin_memory(self) -> "MicroBatch":
        """Copy the tensors to page-locked memory. The DataLoader calls this."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})


class CaptionDataset(Dataset):
    """Pairs as items `{"image": PIL.Image, "caption": str, "file": str}`, read by the key `(epoch, index)`.

    The item of a pair with its own prompt has a `"prompt"` too; an unreadable image is replaced by an
    `"error"`.

    Args:
        pairs: the pairs.
        seed: determines the augmentation.
        shuffle_captions: whether to shuffle the comma-separated tags of captions.
        keep_tokens: how many tags at the start stay in place.
        caption_dropout: probability of training an image with an empty caption.
        open_item: returns what an item says of its image, or raises ImageError.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        seed: int = 0,
        shuffle_captions: bool = False,
        keep_tokens: int = 0,
        caption_dropout: float = 0.0,
        open_item: Callable[[Path], dict[str, Any]] | None = None,
    ) -> None:
        self.pairs = pairs
        self.seed = seed
        self.shuffle_captions = shuffle_captions
        self.keep_tokens = keep_tokens
        self.caption_dropout = caption_dropout
        self.open_item = open_item or open_alone

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        pair = self.pairs[index]
        item = pair.texts | {"file": str(pair.image), "caption": self.caption(epoch, index)}
        try:
            return item | self.open_item(pair.image)
        except ImageError as error:
            return item | {"error": str(error)}

    def caption(self, epoch: int, index: int) -> str:
        """Return the caption for this epoch, after dropout and shuffling of tags."""
        caption = self.pairs[index].caption
        rng = random.Random(f"{self.seed} {epoch} {index}")
        if rng.random() < self.caption_dropout:
            return ""
        if not self.shuffle_captions:
            return caption
        tags = [tag.strip() for tag in caption.split(",")]
        kept, loose = tags[: self.keep_tokens], tags[self.keep_tokens :]
        rng.shuffle(loose)
        return ", ".join(kept + loose)


def open_alone(path: Path) -> dict[str, Any]:
    """Return an item with an image and nothing else of it."""
    return {"image": open_image(path)}


@dataclass
class Collate:
    """Turns items into a MicroBatch with a family's collator; unreadable images are left out and reported."""

    collate_fn: Callable[[Sequence[dict]], dict[str, Any]]

    def __call__(self, items: Sequence[dict]) -> MicroBatch:
        good = [item for item in items if "error" not in item]
        errors = [item["error"] for item in items if "error" in item]
        # A process without readable images still needs a batch: all processes run the model equally often.
        filler = {"image": Image.new("RGB", (32, 32)), "caption": ""}
        try:
            inputs = self.collate_fn(good or [filler])
        except UsageError:
            raise
        except CaptionTrainError:
            reasons = [self._try(item) for item in good]
            if not any(reasons):
                raise
            left = [item | ({"error": r} if r else {}) for item, r in zip(good, reasons, strict=True)]
            return self([*left, *({"error": error} for error in errors)])
        label_tokens = count_label_tokens(inputs["labels"]) if good else 0
        return MicroBatch(hand_over(inputs), [item["file"] for item in good], label_tokens, errors)

    def _try(self, item: dict) -> str | None:
        """Return why the family refuses an item alone, in a line that names its file."""
        try:
            self.collate_fn([item])
        except CaptionTrainError as error:
            return f"{escape_unprintable(item['file'])}: {error}"
        return None


def make_train_dataloader(
    dataset: CaptionDataset,
    plan: BatchPlan,
    collate_fn: Callable[[Sequence[dict]], dict[str, Any]],
    *,
    num_workers: int = 0,
    worker_timeout: float = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of all micro-batches that `plan` has left, across the ends of epochs.

    It has its own random generator. So making an iterator draws no global random numbers, and a resumed run
    sees the same ones as an uninterrupted run.

    Args:
        dataset: the training pairs.
        plan: which samples to read, and in which order.
        collate_fn: the family's collator.
        num_workers: processes that read images; 0 reads them in this one.
        worker_timeout: seconds to wait for a batch of theirs; 0 waits for ever.
        pin_memory: whether to copy batches to page-locked memory.
    """
    return DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=Collate(collate_fn),
        num_workers=num_workers,
        timeout=worker_timeout if num_workers else 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(0),
    )

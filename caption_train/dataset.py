"""Images and captions as training batches. Legend: B images per micro-batch, T tokens."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from caption_train.captions import Pair
from caption_train.collate import count_label_tokens
from caption_train.images import ImageError, open_image
from caption_train.interrupts import ignore_in_worker

Key = tuple[int, int]
"""(epoch, index): a sample's augmentation depends on these and the seed only, so any worker can resume it."""


@dataclass
class MicroBatch:
    """What one process feeds the model at once.

    inputs: the model's keyword arguments. files: the images in it. label_tokens: positions a loss is due on,
    0 for a filler that keeps this process in step with the others. errors: why images were left out.
    """

    inputs: dict[str, Any]
    files: list[str]
    label_tokens: int
    errors: list[str]

    def pin_memory(self) -> "MicroBatch":
        """Copy the tensors to page-locked memory; the DataLoader calls this."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})


def open_items(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """Yield what a collator reads of each pair, whose caption stays as it is; leave out unreadable images."""
    for pair in pairs:
        try:
            yield pair.texts | {"image": open_image(pair.image)}
        except ImageError:
            continue


class CaptionDataset(Dataset):
    """Pairs as `{"image": PIL.Image, "caption": str, "file": str}`, read by the key `(epoch, index)`.

    An item of a pair with its own prompt has a `"prompt"` too.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        seed: int = 0,
        shuffle_captions: bool = False,
        keep_tokens: int = 0,
        caption_dropout: float = 0.0,
    ) -> None:
        self.pairs = pairs
        self.seed = seed
        self.shuffle_captions = shuffle_captions
        self.keep_tokens = keep_tokens
        self.caption_dropout = caption_dropout

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        pair = self.pairs[index]
        item = pair.texts | {"file": str(pair.image), "caption": self.caption(epoch, index)}
        try:
            return item | {"image": open_image(pair.image)}
        except ImageError as error:
            return item | {"error": str(error)}

    def caption(self, epoch: int, index: int) -> str:
        """Return the caption as it is trained on in this epoch: tags shuffled, or all of it dropped."""
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


@dataclass
class BatchPlan(Sampler):
    """Which samples each process reads at every optimizer step: a function of the seed, nothing else.

    An epoch is a permutation of the dataset, cut into effective batches of batch_size × accumulation_steps ×
    num_processes samples. Every sample is read once an epoch by one process, whatever their number; a process
    with nothing left to read in a short last batch gets an empty micro-batch.
    """

    num_samples: int
    batch_size: int = 1
    accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0
    epochs: int = 1
    seed: int = 0
    first_step: int = 0

    @property
    def effective_batch_size(self) -> int:
        """Samples behind one optimizer step."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return math.ceil(self.num_samples / self.effective_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 1, that the 0-based optimizer step belongs to."""
        return step // self.steps_per_epoch + 1

    def micro_batches(self, step: int) -> list[list[Key]]:
        """Return what this process reads for the 0-based optimizer step: as many lists on every process."""
        epoch = self.epoch_of(step)
        start = (step % self.steps_per_epoch) * self.effective_batch_size
        chosen = self._order(epoch)[start : start + self.effective_batch_size]
        width = self.batch_size * self.num_processes
        mine = self.process_index * self.batch_size
        rounds = [chosen[i : i + width] for i in range(0, len(chosen), width)]
        return [[(epoch, index) for index in r[mine : mine + self.batch_size]] for r in rounds]

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first_step, self.total_steps):
            yield from self.micro_batches(step)

    def __len__(self) -> int:
        per_epoch = math.ceil(self.num_samples / (self.batch_size * self.num_processes))
        epochs, steps = divmod(self.first_step, self.steps_per_epoch)
        return (self.epochs - epochs) * per_epoch - steps * self.accumulation_steps

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = epoch, list(range(self.num_samples))
            random.Random(f"{self.seed} {epoch}").shuffle(self._permutation)
        return self._permutation


@dataclass
class Collate:
    """Items → MicroBatch through a family's collator; unreadable images are left out and named."""

    collate_fn: Callable[[Sequence[dict]], dict[str, Any]]

    def __call__(self, items: Sequence[dict]) -> MicroBatch:
        good = [item for item in items if "error" not in item]
        errors = [item["error"] for item in items if "error" in item]
        filler = {"image": Image.new("RGB", (32, 32)), "caption": ""}
        inputs = self.collate_fn(good or [filler])
        label_tokens = count_label_tokens(inputs["labels"]) if good else 0
        return MicroBatch(inputs, [item["file"] for item in good], label_tokens, errors)


def make_train_dataloader(
    dataset: CaptionDataset,
    plan: BatchPlan,
    collate_fn: Callable[[Sequence[dict]], dict[str, Any]],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return the loader of all micro-batches that `plan` has left, in order, over the epochs' boundaries.

    Its generator is its own, so that making an iterator draws nothing from the global random numbers and a
    resumed run sees the ones that the uninterrupted run saw.
    """
    return DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=Collate(collate_fn),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(0),
    )

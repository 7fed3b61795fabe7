"""Generates captions for image files, batch by batch, with a model of any family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from caption_train.adapters.quantization import quantization_config
from caption_train.adapters.record import Base, read_adapter
from caption_train.captioning.batches.encoding import Encode, ImageFiles
from caption_train.captioning.batches.size import (
    BatchSize,
    GrowingBatches,
    OutOfMemoryError,
    free_memory,
    out_of_memory_explained,
)
from caption_train.captioning.engines.graphs import DecodeGraphs
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.sampling import make_sampler
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, naming_model
from caption_train.families.base import Family, Generated
from caption_train.features.source import Keeping
from caption_train.system.console import print_line
from caption_train.system.damage import explaining_damage
from caption_train.system.devices import choose_dtype, move_batch, use_tensor_cores
from caption_train.system.signals import ignore_in_worker
from caption_train.system.workers import limit_batch, limit_workers, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass
class Generation:
    """How captions are generated.

    Attributes:
        prompt: what the model is given with every image.
        settings: generation arguments of transformers.
        make_sampler: makes the `logits_processor` of a batch from the names of its images; None without
            sampling.
    """

    prompt: str
    settings: dict[str, Any]
    make_sampler: Callable[[Sequence[str]], Any] | None = None


def make_generation(options: CaptionOptions, prompt: str) -> Generation:
    """Return how captions are generated. Without a temperature, an image always gets the same caption."""
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": options.max_token_length}
    if options.beams:
        settings["num_beams"] = options.beams
    if not options.temperature:
        return Generation(prompt, settings)
    sampler = partial(make_sampler, temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    return Generation(prompt, settings | {"num_beams": 1}, sampler)


def load_captioner(
    family: Family, base: Base, options: CaptionOptions, device: torch.device
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the base, and put `--peft_model` on it if there is one.

    Args:
        family: the model's family.
        base: the base and its prompt.
        options: `peft_model`, `dtype` and `quantize`.
        device: where the model shall run.

    Returns:
        The model, on the device, in `--dtype` unless it is quantized; and its processor.

    Raises:
        CaptionTrainError: the base or adapter cannot be loaded, or memory does not suffice.
    """
    use_tensor_cores(device)
    dtype = find_dtype(options, device)
    quantization = quantization_config(options.quantize, dtype) if options.quantize else None
    with out_of_memory_explained(device, options.batch_size), naming_model("--base_model"):
        model, processor = family.load(
            base.model_id, revision=base.revision, dtype=dtype, quantization_config=quantization
        )
        family.set_up(processor, base.model_id, base.settings, [base.prompt])
        if not quantization:
            family.speed_up(model)
        if options.peft_model:
            is_exact = not quantization and dtype == torch.float32
            model = _put_adapter(model, options.peft_model, family, is_merged=is_exact)
        return (model.to(device) if quantization else model.to(device, dtype)).eval(), processor


def _put_adapter(model: PreTrainedModel, folder: Path, family: Family, *, is_merged: bool) -> PreTrainedModel:
    """Put an adapter on its base; in float32 it becomes a part of the weights, which saves its own products.

    In half precision it stays beside them: the sum would be rounded to 8 or 11 bits, and small changes lost.
    """
    from caption_train.adapters.load import load_adapter, merge_adapter

    model = load_adapter(model, folder, family)
    try:
        return merge_adapter(model, family) if is_merged and hasattr(model, "merge_and_unload") else model
    except CaptionTrainError:
        # It changes weights that others share, or PEFT cannot merge it: such a one works beside them only.
        return model


def find_dtype(options: CaptionOptions, device: torch.device) -> torch.dtype:
    """Return the precision of a captioning run: `--dtype`, for --quantize auto where that is not given."""
    name = "auto" if options.quantize and "dtype" not in options.sources else options.dtype
    trained = read_adapter(options.peft_model).mixed_precision if options.peft_model else None
    return choose_dtype(name, trained, device)


def caption_images(
    family: Family,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Path | Image.Image],
    generation: Generation,
    *,
    batch_size: BatchSize | int | Literal["auto"] = 4,
    num_workers: int | Literal["auto"] = 0,
    worker_timeout: float = 0,
    prompts: Sequence[str] | None = None,
    keeping: Keeping | None = None,
    graphs: DecodeGraphs | None = None,
    draft: bool = False,
) -> Iterator[CaptionResult | Unreadable]:
    """Caption images.

    Args:
        family: the model's family.
        model: the model, on its device.
        processor: the model's processor.
        images: files, or images in memory.
        generation: prompt and settings.
        batch_size: images per batch; halved when memory does not suffice. "auto" begins with a few, and makes
            the batches larger while memory has room.
        num_workers: processes that open and encode images ahead of the model; "auto" goes by cores and the
            size of the images.
        worker_timeout: seconds to wait for a batch of theirs; 0 waits for ever.
        prompts: that of each image, where they differ from `generation`'s.
        keeping: what the model's vision tower keeps of images; by default nothing.
        graphs: records the model's decoding steps, if that is wanted.
        draft: whether JPEG files may be decoded at a fraction of their size, not below what the model reads.

    Yields:
        A result for each image, in order, as soon as its batch is done.

    Raises:
        CaptionTrainError: out of memory with a single image, or a worker died or does not answer; names the
            flags that help.
    """
    size = BatchSize.of(batch_size, model.device)
    if num_workers == "auto":
        num_workers = size.choose_workers(images)
    run = CaptionRun(
        *(family, model, processor, generation, num_workers, worker_timeout, keeping, graphs),
        draft=draft,
    )
    done = 0
    while done < len(images):
        try:
            loader = run.load(images[done:], prompts and prompts[done:], size, done)
            for result in run.caption(loader, size):
                yield result
                done += 1
        except OutOfMemoryError:
            if size.now == 1:
                raise
            line = size.halve()
        else:
            return
        run.make_room(line)


@dataclass
class CaptionRun:
    """What is the same for all batches of `caption_images`, which explains it."""

    family: Family
    model: PreTrainedModel
    processor: ProcessorMixin
    generation: Generation
    num_workers: int
    worker_timeout: float
    keeping: Keeping | None
    graphs: DecodeGraphs | None
    draft: bool = False

    def caption(self, loader: DataLoader, size: BatchSize) -> Iterator[CaptionResult | Unreadable]:
        """Yield a result for each image of a loader that `load` or `load_batches` made, in order."""
        with reading(loader) as batches:
            for number, batch in enumerate(batches):
                # What is wrong with a checkpoint's generation_config.json shows when it first generates.
                explained = explaining_damage("the model cannot caption: is it damaged?")
                rows = sum("error" not in item for item in batch["items"])
                with nullcontext() if number else explained, size.measuring(rows):
                    results = self.caption_batch(batch, size.now)
                yield from results

    def load(
        self, images: Sequence[Path | Image.Image], prompts: Sequence[str] | None, size: BatchSize, first: int
    ) -> DataLoader:
        """Return a loader of these images; `first` is the number of the first one in memory."""
        longest = max(prompts or [self.generation.prompt], key=len)
        workers = min(self.num_workers, len(images) // size.now)
        source = self.keeping and self.keeping.source
        files = ImageFiles(images, prompts, source, first, self.find_least_side())
        if size.is_auto:
            batches = GrowingBatches(len(images), size)
            return self.load_batches(files, size, workers, longest, batch_sampler=batches)
        return self.load_batches(files, size, workers, longest, batch_size=size.now)

    def find_least_side(self) -> int | None:
        """Return the `at_least` of ImageFiles."""
        return self.family.find_side(self.processor) if self.draft else None

    def load_batches(
        self, images: Dataset, size: BatchSize, workers: int, longest: str, **batching: Any
    ) -> DataLoader:
        """Return a loader.

        Args:
            images: gives items as ImageFiles does.
            size: says how many images a batch may have.
            workers: processes that are asked for.
            longest: the longest prompt.
            batching: arguments of DataLoader that say what a batch is.
        """

        def measure(images: int) -> int:
            return images * self.family.measure_inputs(self.processor, longest)

        if workers and size.is_auto:
            size.limit(limit_batch(workers, measure(1)))
        workers, line = limit_workers(workers, lambda: measure(size.most))
        if line:
            size.say(line)
        return DataLoader(
            images,
            collate_fn=Encode(self.family, self.processor, self.generation.prompt),
            num_workers=workers,
            timeout=self.worker_timeout if workers else 0,
            worker_init_fn=ignore_in_worker,
            pin_memory=self.model.device.type == "cuda",
            **batching,
        )

    def make_room(self, line: str) -> None:
        """Give back what a batch that did not fit still holds, and print how it goes on.

        Not to be called in the except block, where the traceback keeps the batch's tensors alive.
        """
        if self.graphs:
            self.graphs.free()
        free_memory(self.model.device)
        print_line(line)

    def caption_batch(self, batch: dict[str, Any], batch_size: int) -> list[CaptionResult | Unreadable]:
        """Return a result for each image of what `Encode` made."""
        if batch["error"]:
            raise batch["error"]
        good = [item["path"] for item in batch["items"] if "error" not in item]
        given = self.keeping.encoder.given if self.keeping else nullcontext
        with (
            out_of_memory_explained(self.model.device, batch_size),
            torch.inference_mode(),
            given(batch["inputs"]) as inputs,
        ):
            results = iter(self._generate(inputs, good) if good else ())
        return [
            Unreadable(item["path"], item["error"])
            if "error" in item
            else CaptionResult(item["path"], item["size"], next(results))
            for item in batch["items"]
        ]

    def _generate(self, inputs: dict[str, Any], images: Sequence[Path]) -> list[Generated]:
        settings = dict(self.generation.settings)
        if self.generation.make_sampler:
            settings["logits_processor"] = self.generation.make_sampler([image.name for image in images])
        inputs = move_batch(inputs, self.model.device, self.model.dtype)
        decoding = self.graphs.decoding(inputs, settings) if self.graphs else nullcontext({})
        with decoding as more:
            return self.family.generate(self.model, self.processor, inputs, **settings, **more)

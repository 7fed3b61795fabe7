"""Generates captions for image files, batch by batch, with a model of any family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from caption_train.adapters.quantization import quantization_config
from caption_train.adapters.record import Base, read_adapter
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.sampling import make_sampler
from caption_train.config.captioning import CaptionOptions
from caption_train.data.images import ImageError, normalize_image, open_image
from caption_train.errors import CaptionTrainError, UsageError, is_out_of_memory, naming_model
from caption_train.families.base import Family, Generated
from caption_train.system.console import escape_unprintable
from caption_train.system.damage import explaining_damage
from caption_train.system.devices import choose_dtype, move_batch, use_tensor_cores
from caption_train.system.signals import ignore_in_worker
from caption_train.system.workers import hand_over, limit_workers, reading

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
        # It changes weights that others share: such a one works beside them only.
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
    batch_size: int = 4,
    num_workers: int = 0,
    worker_timeout: float = 0,
    prompts: Sequence[str] | None = None,
) -> Iterator[CaptionResult | Unreadable]:
    """Caption images.

    Args:
        family: the model's family.
        model: the model, on its device.
        processor: the model's processor.
        images: files, or images in memory.
        generation: prompt and settings.
        batch_size: images per batch.
        num_workers: processes that open and encode images ahead of the model.
        worker_timeout: seconds to wait for a batch of theirs; 0 waits for ever.
        prompts: that of each image, where they differ from `generation`'s.

    Yields:
        A result for each image, in order, as soon as its batch is done.

    Raises:
        CaptionTrainError: out of memory, or a worker died or does not answer; names the flags that help.
    """
    num_workers, line = limit_workers(
        min(num_workers, len(images) // batch_size),
        lambda: family.measure_inputs(processor, max(prompts or [generation.prompt], key=len)) * batch_size,
    )
    if line:
        print(line, file=sys.stderr)
    loader = DataLoader(
        ImageFiles(images, prompts),
        batch_size=batch_size,
        collate_fn=Encode(family, processor, generation.prompt),
        num_workers=num_workers,
        timeout=worker_timeout if num_workers else 0,
        worker_init_fn=ignore_in_worker,
        pin_memory=model.device.type == "cuda",
    )
    with reading(loader) as batches:
        for number, batch in enumerate(batches):
            # What is wrong with a checkpoint's generation_config.json shows when it first generates.
            with nullcontext() if number else explaining_damage("the model cannot caption: is it damaged?"):
                results = _caption_batch(batch, family, model, processor, generation, batch_size)
            yield from results


def _caption_batch(
    batch: dict[str, Any],
    family: Family,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    generation: Generation,
    batch_size: int,
) -> list[CaptionResult | Unreadable]:
    if batch["error"]:
        raise batch["error"]
    good = [item["path"] for item in batch["items"] if "error" not in item]
    with out_of_memory_explained(model.device, batch_size), torch.inference_mode():
        results = iter(_generate(family, model, processor, batch["inputs"], good, generation))
    return [
        Unreadable(item["path"], item["error"])
        if "error" in item
        else CaptionResult(item["path"], item["size"], next(results))
        for item in batch["items"]
    ]


class ImageFiles(Dataset):
    """Images as `{"path", "size", "image"}`, or `{"path", "error"}` for what cannot be read.

    The path of an image in memory is `image N`. With `prompts`, an item has its `"prompt"` too.
    """

    def __init__(self, paths: Sequence[Path | Image.Image], prompts: Sequence[str] | None = None) -> None:
        self.paths = paths
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = self.paths[index]
        in_memory = isinstance(given, Image.Image)
        path = Path(f"image {index}") if in_memory else given
        try:
            image = normalize_image(given.copy()) if in_memory else open_image(path)
        except ImageError as error:
            # The message of a file begins with its path.
            return {"path": path, "error": f"{path}: {error}" if in_memory else str(error)}
        item = {"path": path, "size": image.size, "image": image}
        return item if self.prompts is None else item | {"prompt": self.prompts[index]}


@dataclass
class Encode:
    """Turns items of ImageFiles into `inputs` by the family's `encode`, and `items` without pixels."""

    family: Family
    processor: Any
    prompt: str

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        try:
            inputs = self._encode(items)
        except CaptionTrainError as error:
            # Returned: an error raised in a worker arrives with the worker's traceback in its message.
            return {"items": items, "inputs": {}, "error": error}
        finally:
            for item in items:
                item.pop("image", None)
        return {"items": items, "inputs": hand_over(inputs), "error": None}

    def _encode(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the model's inputs of all items with an image; what the family refuses gets an error."""
        good = [item for item in items if "image" in item]
        images, prompts = [item["image"] for item in good], [self._prompt_of(item) for item in good]
        try:
            return self.family.encode(self.processor, images, prompts) if images else {}
        except CaptionTrainError as error:
            # A prompt of the run is wrong for all images, one of an image for that image.
            if isinstance(error, UsageError) and all(prompt == self.prompt for prompt in prompts):
                raise
            found = ((index, self._try(item)) for index, item in enumerate(items))
            refused = {index: error for index, error in found if error}
            if not refused:
                raise
        for index, error in refused.items():
            del items[index]["image"]
            items[index]["error"] = f"{escape_unprintable(items[index]['path'])}: {error}"
        return self._encode(items)

    def _try(self, item: dict[str, Any]) -> CaptionTrainError | None:
        """Return why the family refuses an item alone."""
        if "image" not in item:
            return None
        try:
            self.family.encode(self.processor, [item["image"]], [self._prompt_of(item)])
        except CaptionTrainError as error:
            return error
        return None

    def _prompt_of(self, item: dict[str, Any]) -> str:
        return item.get("prompt", self.prompt)


def _generate(
    family: Family,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: dict[str, Any],
    images: Sequence[Path],
    generation: Generation,
) -> list[Generated]:
    if not images:
        return []
    settings = dict(generation.settings)
    if generation.make_sampler:
        settings["logits_processor"] = generation.make_sampler([image.name for image in images])
    return family.generate(model, processor, move_batch(inputs, model.device, model.dtype), **settings)


@contextmanager
def out_of_memory_explained(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into one line that names the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CaptionTrainError(
            f"out of memory on {device} with --batch_size {batch_size}: lower it, or --beams or "
            "--max_token_length, or try --dtype bfloat16"
        ) from error

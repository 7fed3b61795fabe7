"""The functions that `import caption_train` offers: what the scripts do, from Python.

Flags are keyword arguments of the same names, with the scripts' defaults. What a user can cause is a
UsageError or a CaptionTrainError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import FAMILIES, get_family

if TYPE_CHECKING:
    from PIL import Image

    from caption_train.captioning.generate import CaptionResult, Unreadable
    from caption_train.config.captioning import CaptionOptions
    from caption_train.families.base import Family

Options = TypeVar("Options")


def load_family(name: str) -> Family:
    """Return a model family by name, to look at its facts or to load its models.

    Raises:
        UsageError: there is no such family.
    """
    if name not in FAMILIES:
        raise UsageError(f"family {name!r}: the families are {', '.join(FAMILIES)}")
    return get_family(name)


def compile_dataset(dataset_dir: Path | str, output_dir: Path | str | None = None, **flags: Any) -> Path:
    """Compile images with captions beside them into a dataset, as compile_captions.py does.

    Args:
        dataset_dir: the folder of pairs, or a Kohya folder.
        output_dir: where the dataset is written; None is dataset_dir itself.
        flags: those of compile_captions.py.

    Returns:
        The metadata.jsonl that was written.
    """
    from caption_train.compiling.compile import compile_folder, raise_problems
    from caption_train.config.compiling import CompileOptions
    from caption_train.data.formats import METADATA_NAME

    options = _make_options(CompileOptions, flags, dataset_dir=dataset_dir, output_dir=output_dir)
    compiled, losses = compile_folder(options)
    raise_problems(compiled, losses)
    return compiled.output_dir / METADATA_NAME


def train(
    family: str, dataset_dir: Path | str, output_dir: Path | str, *, model_id: str | None = None, **flags: Any
) -> dict[str, Any]:
    """Train a LoRA, as the training scripts do.

    Args:
        family: the name of the model's family.
        dataset_dir: images with captions, or what `compile_dataset` made of them.
        output_dir: gets the LoRA, its checkpoints and its log.
        model_id: the base, a hub id or a folder; the family's default if not given.
        flags: those of the training scripts.

    Returns:
        What summary.json in output_dir holds: losses, metrics, time, memory.
    """
    from caption_train.config.training import TrainOptions
    from caption_train.training.prepare import prepare_training

    chosen = load_family(family)
    defaults = {"target_modules": list(chosen.facts.lora_target_modules), **chosen.train_defaults}
    options = _make_options(
        TrainOptions,
        defaults | flags,
        dataset_dir=dataset_dir,
        output_dir=output_dir,
        model_id=model_id or chosen.model_id,
    )
    return prepare_training(options, chosen).train()


def caption(
    images: Path | str | Image.Image | Iterable[Path | str | Image.Image],
    *,
    family: str | None = None,
    peft_model: Path | str | None = None,
    base_model: str | None = None,
    **flags: Any,
) -> list[str]:
    """Caption images with a base model, or with a LoRA on it.

    Args:
        images: paths or PIL images, one or many.
        family: the name of the model's family; not needed where the LoRA says it.
        peft_model: the folder of a LoRA.
        base_model: a hub id or a folder; the LoRA's base, or the family's default, if not given.
        flags: those of the inference scripts that say how captions are made, such as `prompt` or `beams`.

    Returns:
        A caption for each image, in their order.

    Raises:
        CaptionTrainError: an image cannot be read, or the model cannot be loaded.
    """
    from caption_train.adapters.record import read_adapter, read_request, resolve_base
    from caption_train.captioning.generate import Unreadable
    from caption_train.config.captioning import CaptionOptions

    images = list(images) if isinstance(images, Iterable) and not isinstance(images, str) else [images]
    adapter = read_adapter(peft_model) if peft_model else None
    name = family or (adapter.family if adapter else None)
    if name is None:
        raise UsageError("family is required: the name of the model's family")
    chosen = load_family(name)
    flags = flags | {"images": ["-"], "peft_model": peft_model, "base_model": base_model}
    options = _make_options(CaptionOptions, {"num_workers": 0} | flags)
    prompt, settings = read_request(options, chosen)
    base = resolve_base(chosen, options.base_model, options.revision, prompt, adapter, settings=settings)
    results = []
    for result in _caption(images, chosen, base, options) if images else ():
        if isinstance(result, Unreadable):
            raise CaptionTrainError(result.reason)
        results.append(result.generated.text)
    return results


def export(source: Path | str, output_dir: Path | str, **flags: Any) -> Path:
    """Write an adapter or a model in another form, as export_adapter.py does, and return its folder.

    Args:
        source: the folder of an adapter or a model.
        output_dir: gets the result; must not exist unless `overwrite=True`.
        flags: those of export_adapter.py, such as `merge=True`.
    """
    from caption_train.config.exporting import ExportOptions
    from caption_train.exporting.export import export as export_adapter
    from caption_train.exporting.export import find_family

    options = _make_options(ExportOptions, flags, source=source, output_dir=output_dir)
    export_adapter(options, load_family(find_family(options)))
    return options.output_dir


def _caption(
    images: list[Any], family: Family, base: Any, options: CaptionOptions
) -> Iterable[CaptionResult | Unreadable]:
    from caption_train.captioning.generate import caption_images, load_captioner, make_generation
    from caption_train.system.devices import choose_device

    model, processor = load_captioner(family, base, options, choose_device(options.device))
    return caption_images(
        family,
        model,
        processor,
        [image if _is_image(image) else Path(image) for image in images],
        make_generation(options, base.prompt),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        worker_timeout=options.worker_timeout,
    )


def _is_image(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)


def _make_options(options_class: type[Options], flags: Mapping[str, Any], **paths: Any) -> Options:
    """Return checked options; text becomes a path where the field is one.

    Raises UsageError with all that is wrong, a line each.
    """
    known = {f.name: f for f in fields(options_class) if "help" in f.metadata}
    for name in flags:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"{name}: there is no such flag" + (f"; did you mean {close[0]}?" if close else "")
            )
    given = {name: value for name, value in {**flags, **paths}.items() if value is not None}
    for name, value in given.items():
        takes_path = "Path" in str(known[name].type)
        if isinstance(value, str | Path):
            given[name] = Path(value) if takes_path else str(value)
    options = options_class(**given)
    if problems := options.check():
        raise UsageError("\n".join(problems))
    return options

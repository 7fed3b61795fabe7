"""The functions that `import caption_train` offers: what the scripts do, from Python.

Flags are keyword arguments of the same names, with the scripts' defaults. What a user can cause is a
UsageError or a CaptionTrainError.
"""

from __future__ import annotations

import argparse
import difflib
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from caption_train.config.fields import convert_value
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.system.console import quiet_libraries, set_quiet

if TYPE_CHECKING:
    from PIL import Image

    from caption_train.adapters.record import Base
    from caption_train.captioning.plan import CaptionResult, Unreadable
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
        flags: those of compile_captions.py but `dry_run`.

    Returns:
        The metadata.jsonl that was written.
    """
    from caption_train.compiling.compile import compile_folder, raise_problems
    from caption_train.config.compiling import CompileOptions
    from caption_train.data.formats import METADATA_NAME

    given = flags | {"dataset_dir": dataset_dir, "output_dir": output_dir}
    options = _make_options(CompileOptions, given, omit={"dry_run", "list_all"})
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
        flags: those of the training scripts but `plan` and `memory_budget`. `resume="auto"` goes on from the
            newest checkpoint in output_dir.

    Returns:
        What summary.json in output_dir holds: losses, metrics, time, memory.
    """
    from caption_train.config.training import TrainOptions
    from caption_train.training.prepare import prepare_training

    chosen = load_family(family)
    options = _make_options(
        TrainOptions,
        flags | {"dataset_dir": dataset_dir, "output_dir": output_dir, "model_id": model_id},
        chosen,
        defaults={"target_modules": list(chosen.facts.lora_target_modules), **chosen.train_defaults},
        omit={"plan", "memory_budget"},
    )
    chosen.cache_converted = options.cache_converted
    return prepare_training(options, chosen).train()


def caption(
    images: Path | str | Image.Image | Iterable[Path | str | Image.Image],
    *,
    family: str | None = None,
    peft_model: Path | str | None = None,
    base_model: str | None = None,
    **flags: Any,
) -> list[str]:
    """Caption images with a base model, or with a LoRA on it. Nothing is written.

    Args:
        images: paths or PIL images, one or many.
        family: the name of the model's family; not needed where the LoRA says it.
        peft_model: the folder of a LoRA.
        base_model: a hub id or a folder; the LoRA's base, or the family's default, if not given.
        flags: those of the inference scripts that say how captions are made, such as `prompt` or `beams`, but
            not where they are written. `num_workers` is 0 if not given. With a temperature, what a caption
            draws depends on the file's name, or for an image in memory on its place in `images`.

    Returns:
        A caption for each image, in their order.

    Raises:
        CaptionTrainError: an image cannot be read, or the model cannot be loaded.
    """
    from caption_train.adapters.record import read_adapter, read_request, resolve_base
    from caption_train.captioning.outputs import finish_caption
    from caption_train.captioning.plan import Unreadable
    from caption_train.config.captioning import CaptionOptions

    images = list(images) if isinstance(images, Iterable) and not isinstance(images, str) else [images]
    adapter = read_adapter(peft_model) if peft_model else None
    name = family or (adapter.family if adapter else None)
    if name is None:
        raise UsageError("family is required: the name of the model's family")
    chosen = load_family(name)
    given = flags | {"peft_model": peft_model, "base_model": base_model}
    defaults = {"images": ["-"], "num_workers": 0}
    options = _make_options(CaptionOptions, given, chosen, defaults=defaults, omit=WRITING_FLAGS)
    chosen.cache_converted = options.cache_converted
    prompt, settings = read_request(options, chosen)
    base = resolve_base(chosen, options.base_model, options.revision, prompt, adapter, settings=settings)
    texts = []
    for result in _caption(images, chosen, base, options) if images else ():
        if isinstance(result, Unreadable):
            raise CaptionTrainError(result.reason)
        texts.append(finish_caption(result.generated.text, options))
    return texts


WRITING_FLAGS = {
    *("images", "recursive", "save_captions", "caption_extension", "output", "overwrite", "visualize"),
    *("existing", "separator", "limit", "shard", "metadata", "prompts", "prompt_template"),
    *("output_shards", "output_format", "engine", "actors", "gpus_per_actor", "group_by_length"),
    *("endpoint", "model", "concurrency", "timeout", "retries"),
}
"""Flags of the inference scripts that `caption` has no use for."""


def evaluate(
    dataset_dir: Path | str,
    output_dir: Path | str,
    *,
    peft_model: Path | str | Iterable[Path | str] = (),
    family: str | None = None,
    base_model: str | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Caption a dataset with a base and with LoRAs on it, and compare, as evaluate_captions.py does.

    Args:
        dataset_dir: images, with reference captions or without.
        output_dir: gets evaluation.json, evaluation.md, report.html and the captions made so far.
        peft_model: the folder of a LoRA, or several.
        family: the name of the model's family; not needed where a LoRA says it.
        base_model: a hub id or a folder; the LoRAs' base if not given.
        flags: those of evaluate_captions.py, such as `limit` or `clip_model`. `num_workers` is 0 if not
            given.

    Returns:
        What evaluation.json in output_dir holds: for each model, the base first, every score with its
        interval; every caption; a line for each image that cannot be read.

    Raises:
        CaptionTrainError: no image can be read, a model cannot be loaded, or `fail_on_regression` finds a
            LoRA worse than the base.
    """
    from caption_train.config.evaluation import EvaluateOptions
    from caption_train.evaluation.evaluate import evaluate_models, raise_regressions

    adapters = [peft_model] if isinstance(peft_model, Path | str) else list(peft_model)
    given = flags | {"dataset_dir": dataset_dir, "output_dir": output_dir, "peft_model": adapters}
    given |= {"family": family, "base_model": base_model}
    results = evaluate_models(_make_options(EvaluateOptions, given, defaults={"num_workers": 0}))
    raise_regressions(results)

    from caption_train.evaluation.results import describe_results

    return describe_results(results)


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

    options = _make_options(ExportOptions, flags | {"source": source, "output_dir": output_dir})
    export_adapter(options, load_family(find_family(options)))
    return options.output_dir


def _caption(
    images: list[Any], family: Family, base: Base, options: CaptionOptions
) -> Iterable[CaptionResult | Unreadable]:
    from PIL import Image

    from caption_train.captioning.engines.local import LocalEngine
    from caption_train.captioning.prompts import Task
    from caption_train.system.processes import Processes

    engine = LocalEngine(family, base, options, Processes())
    engine.open()
    images = [image if isinstance(image, Image.Image) else Path(image) for image in images]
    return engine.caption([Task(image, base.prompt) for image in images])


def _make_options(
    options_class: type[Options],
    given: Mapping[str, Any],
    family: Family | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    omit: Collection[str] = (),
) -> Options:
    """Return checked options, and apply `quiet`.

    Args:
        options_class: the dataclass of the flags.
        given: name → value; None is not given.
        family: whose flags and values there are; None where that does not matter.
        defaults: values that are not the dataclass's.
        omit: flags that this function does not take.

    Raises:
        UsageError: all that is wrong, a line each.
    """
    quiet_libraries()
    omit = {*omit, *(family.absent_flags() if family else ())}
    known = {f.name: f for f in fields(options_class) if "help" in f.metadata and f.name not in omit}
    choices = {name: f.metadata["choices"] for name, f in known.items()}
    choices |= family.flag_choices() if family else {}
    given = {name: value for name, value in given.items() if value is not None}
    hints = typing.get_type_hints(options_class)
    problems, values = [], {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(
                f"{name}: there is no such flag" + (f"; did you mean {close[0]}?" if close else "")
            )
            continue
        try:
            plain = list(value) if isinstance(value, tuple) else value
            values[name] = convert_value(plain, hints[name], known[name], choices[name])
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            problems.append(f"{name}: {value!r} is not a valid value")
    if not problems:
        sources = dict.fromkeys(values, "argument")
        options = options_class(**{**(defaults or {}), **values}, sources=sources)
        problems = options.check()
    if problems:
        raise UsageError("\n".join(problems))
    set_quiet(options.quiet)
    return options

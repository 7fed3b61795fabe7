"""Loads the base, makes it trainable, and records where the run comes from."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from caption_train.adapters.continuing import adopt_adapter, refuse_parts
from caption_train.adapters.initialization import initialize_lora
from caption_train.adapters.load import fill_adapter, read_weights
from caption_train.adapters.lora import wrap_with_lora
from caption_train.adapters.quantization import make_quantization_config, prepare_quantized
from caption_train.adapters.record import (
    Base,
    TrainingRecord,
    describe_options,
    find_versions,
    read_request,
    resolve_base,
)
from caption_train.adapters.targets import freeze_outside
from caption_train.config.training import TrainOptions
from caption_train.config.values import read_part_rates
from caption_train.data.columns.table import Pairs
from caption_train.errors import UsageError
from caption_train.families.base import Family, ModelFacts
from caption_train.families.weight_files import fingerprint_model
from caption_train.system.memory import trimming_heap
from caption_train.training.memory.gradient_checkpointing import enable_checkpointing
from caption_train.training.run.data import TrainingData

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_options(options: TrainOptions, family: Family) -> tuple[TrainOptions, Base]:
    """Return the options with what the base decides filled in, and the base."""
    prompt, settings = read_request(options, family)
    options, adapter = adopt_adapter(options)
    base = resolve_base(
        family,
        options.model_id,
        options.revision,
        prompt,
        adapter,
        settings=settings,
        flag="--model_id",
        adapter_flag="--init_adapter",
    )
    targets = options.target_modules or list(base.facts.lora_target_modules)
    if options.cache_features:
        unfrozen = [part for part in options.unfrozen_parts if part not in family.kept_parts]
        options = replace(options, train_parts=options.train_parts or unfrozen)
        if trained := [part for part in family.kept_parts if part in options.train_parts]:
            raise UsageError(
                f"--cache_features keeps what {' and '.join(family.kept_parts)} of {family.title} make of an "
                f"image: leave {trained[0]} out of --train_parts, or drop it"
            )
        if options.init_adapter:
            refuse_parts(options.init_adapter, base.facts.parts, family.kept_parts, "--cache_features")
    # In one order and spelling: a resumed run compares them as text.
    rates = [f"{part}={rate}" for part, rate in read_part_rates(options.part_learning_rates).items()]
    options = replace(
        options,
        model_id=base.model_id,
        revision=base.revision,
        target_modules=targets,
        part_learning_rates=rates or None,
    )
    return options, base


def load_trainable(
    options: TrainOptions,
    family: Family,
    facts: ModelFacts,
    accelerator: Accelerator,
    checkpoint: Path | None = None,
    *,
    is_empty: bool = False,
) -> tuple[nn.Module, Any]:
    """Load the base, and make trainable what `--train_method` names.

    Args:
        options: what to train.
        family: the model's family.
        facts: what the checkpoint's config.json says.
        accelerator: decides precision and device.
        checkpoint: where the trained weights come from, if the run is resumed.
        is_empty: whether to load no weights: the base is on the meta device, and not quantized.

    Returns:
        The model, on the CPU unless it is quantized, and its processor.
    """
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
    is_lora = options.train_method == "lora"
    parts = [facts.parts[part] for part in options.train_parts]
    dtype = options.dtype if options.dtype != "auto" else half if is_lora else "float32"
    quantization = make_quantization_config(
        options, accelerator.mixed_precision, facts.parts, accelerator.device
    )
    load = family.load_empty if is_empty else partial(family.load, quantization_config=quantization)
    with trimming_heap() if quantization else nullcontext():
        model, processor = load(
            options.model_id if is_lora or checkpoint is None else str(checkpoint),
            revision=options.revision,
            dtype=DTYPES[dtype],
        )
        model = prepare_quantized(model)
    if is_lora:
        start = None
        if options.init_adapter and checkpoint is None:
            _, start = read_weights(model, options.init_adapter, family, "--init_adapter")
        model = wrap_with_lora(
            model,
            options.target_modules,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            rslora=options.rslora,
            dora=options.dora,
            parts=parts,
            init=options.init_lora_weights,
        )
        _name_base(model, options)
        initialize_lora(model, options, accelerator.device, checkpoint)
        if start is not None:
            fill_adapter(model, start, options.init_adapter, "--init_adapter")
    else:
        freeze_outside(model, parts)
    if options.gradient_checkpointing or options.activation_checkpointing:
        enable_checkpointing(model)
    return model, processor


def make_record(options: TrainOptions, family: Family, base: Base, data: TrainingData) -> TrainingRecord:
    """Return what the saved LoRA will say about where it comes from; parameters are counted later.

    Raises UsageError for the prompt of a row that the family cannot read.
    """
    check_prompts(family, data.train + data.validation)
    return TrainingRecord(
        family=family.name,
        base_model=_base_name(options),
        revision=options.revision,
        prompt=base.prompt,
        options=describe_options(options),
        dataset=data.describe(),
        versions=find_versions(),
        base_fingerprint=fingerprint_model(options.model_id),
    )


def check_prompts(family: Family, pairs: Pairs) -> None:
    """Raise UsageError for the prompt of a row that the family cannot read, naming the row."""
    prompts = pairs.prompts()
    # Each once: a dataset of a million rows mostly has a few.
    for prompt in dict.fromkeys(prompts):
        try:
            family.check_prompt(prompt or "")
        except UsageError as error:
            source = pairs[prompts.index(prompt)].source
            raise UsageError(f"{source}: {str(error).removeprefix('--')}") from error


def _base_name(options: TrainOptions) -> str:
    """Return the base's name by which others find it: the hub id, or the absolute path of a folder."""
    folder = Path(options.model_id)
    return str(folder.resolve()) if folder.is_dir() else options.model_id


def _name_base(model: nn.Module, options: TrainOptions) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = _base_name(options)
    config.revision = options.revision

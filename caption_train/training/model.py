"""Loads the base, makes it trainable, and records where the run comes from."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from caption_train.adapters.initialization import initialize_lora
from caption_train.adapters.lora import wrap_with_lora
from caption_train.adapters.quantization import make_quantization_config, prepare_quantized
from caption_train.adapters.record import TrainingRecord, describe_options, find_versions
from caption_train.adapters.targets import freeze_outside
from caption_train.config.training import TrainOptions
from caption_train.data.pairs import Pair
from caption_train.errors import UsageError
from caption_train.families.base import Family
from caption_train.system.files import fingerprint_model
from caption_train.system.memory import trimming_heap
from caption_train.training.memory.gradient_checkpointing import enable_checkpointing
from caption_train.training.run.data import TrainingData

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def list_facts(record: TrainingRecord, checkpoint: Path | None) -> dict[str, Any]:
    """Return what must be the same in every process, beside its flags: machines may differ in these."""
    return {
        **{f"dataset's {name}": value for name, value in record.dataset.items()},
        **record.versions,
        "the checkpoint to go on from": checkpoint and checkpoint.name,
    }


def load_trainable(
    options: TrainOptions, family: Family, accelerator: Accelerator, checkpoint: Path | None
) -> tuple[nn.Module, Any]:
    """Load the base and make trainable what `--train_method` names; weights from `checkpoint` if resuming."""
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
    is_lora = options.train_method == "lora"
    parts = [family.parts[part] for part in options.train_parts]
    dtype = options.dtype if options.dtype != "auto" else half if is_lora else "float32"
    quantization = make_quantization_config(options, accelerator.mixed_precision, family.parts)
    with trimming_heap() if quantization else nullcontext():
        model, processor = family.load(
            options.model_id if is_lora or checkpoint is None else str(checkpoint),
            revision=options.revision,
            dtype=DTYPES[dtype],
            quantization_config=quantization,
        )
        model = prepare_quantized(model)
    if is_lora:
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
    else:
        freeze_outside(model, parts)
    if options.gradient_checkpointing or options.activation_checkpointing:
        enable_checkpointing(model)
    return model, processor


def make_record(options: TrainOptions, family: Family, data: TrainingData) -> TrainingRecord:
    """Return what the saved LoRA will say of where it comes from; parameters are counted later.

    Raises UsageError for a prompt that the family cannot read, the run's or a row's.
    """
    prompt = next(p for p in (options.prompt, options.task, family.default_prompt) if p is not None)
    if check_prompt := getattr(family, "check_prompt", None):
        check_prompt(prompt)
        _check_prompts(check_prompt, data.train + data.validation)
    return TrainingRecord(
        family=family.name,
        base_model=_base_name(options),
        revision=options.revision,
        prompt=prompt,
        options=describe_options(options),
        dataset=data.describe(),
        versions=find_versions(),
        base_fingerprint=fingerprint_model(options.model_id),
    )


def _check_prompts(check_prompt: Callable[[str], None], pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        try:
            check_prompt(pair.prompt or "")
        except UsageError as error:
            raise UsageError(f"{pair.source}: {str(error).removeprefix('--')}") from error


def _base_name(options: TrainOptions) -> str:
    """Return the base as others can find it: the hub's id, or the absolute path of a folder."""
    folder = Path(options.model_id)
    return str(folder.resolve()) if folder.is_dir() else options.model_id


def _name_base(model: nn.Module, options: TrainOptions) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = _base_name(options)
    config.revision = options.revision

"""From options to a run that is ready to train: data, model, LoRA, optimizer, and where it stood."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from caption_train.accelerator import make_accelerator, make_lr_scheduler, make_optimizer
from caption_train.agreement import check_agreement, fail_together, list_facts, say
from caption_train.captions import Pair
from caption_train.checkpoint import clear_partial
from caption_train.checkpointing import enable_checkpointing
from caption_train.console import print_settings
from caption_train.dataset import BatchPlan, CaptionDataset, make_train_dataloader
from caption_train.errors import UsageError
from caption_train.evaluation import Evaluator
from caption_train.families.base import Batch, Family
from caption_train.files import find_commit, fingerprint_model
from caption_train.fitting import fit_batch_size
from caption_train.heap import giving_back_memory
from caption_train.launcher import notice_launcher
from caption_train.lock import OutputLock
from caption_train.lora import count_parameters, wrap_with_lora
from caption_train.model_card import TrainingRecord, describe_options, find_versions
from caption_train.options import TrainOptions
from caption_train.parts import freeze_outside
from caption_train.previews import Sampler
from caption_train.quantization import make_quantization_config, prepare_quantized
from caption_train.resume import adopt_batch_size, check_same_run, find_resume_point, resume_run
from caption_train.run import Run
from caption_train.saving import Saver
from caption_train.sharding import describe_launch, prepare, shard
from caption_train.starting import look_at_data, start_lora
from caption_train.tracking import RunLog, check_trackers, start_trackers
from caption_train.training import Trainer
from caption_train.training_data import TrainingData, read_training_data

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare_training(options: TrainOptions, family: Family) -> Trainer:
    """Make everything a run needs. Cheap checks come first: flags and data before the model loads."""
    accelerator = make_accelerator(options)
    notice_launcher(accelerator.num_processes)
    with fail_together(accelerator):
        lock = _open_output_dir(options, accelerator)
    try:
        return _prepare(options, family, accelerator, lock)
    except BaseException:
        lock.abandon()
        raise


def _prepare(options: TrainOptions, family: Family, accelerator: Accelerator, lock: OutputLock) -> Trainer:
    check_agreement(accelerator, describe_options(options))
    data = read_training_data(options, accelerator)
    with fail_together(accelerator):
        if accelerator.is_main_process:
            check_trackers(options.log_with)
        checkpoint = find_resume_point(options, accelerator)
        if options.auto_batch_size and checkpoint is not None:
            adopt_batch_size(options, checkpoint)
        record = make_record(options, family, data)
        if checkpoint is not None:
            check_same_run(checkpoint, record, accelerator, options.resume_anyway)
    check_agreement(accelerator, list_facts(record, checkpoint))
    set_seed(options.seed)
    with fail_together(accelerator):
        model, processor = load_trainable(options, family, accelerator, checkpoint)
        # A prompt too long for this model is better refused here than in a process that reads images.
        longest = max((pair.prompt or "" for pair in data.train + data.validation), key=len)
        family.encode(processor, [Image.new("RGB", (32, 32))] * 2, [record.prompt, longest or record.prompt])
    record.base_commit = find_commit(options.model_id, options.revision)
    record.trainable_parameters, record.total_parameters = count_parameters(model)
    plan = _make_plan(options, len(data.train), accelerator)
    if describe_launch(accelerator) == "FSDP":
        model = shard(model, accelerator)
    optimizer = make_optimizer(options, model)
    lr_scheduler = make_lr_scheduler(options, optimizer, plan.total_steps)
    model, optimizer = prepare(accelerator, model, optimizer)
    # The LoRA starts the same on every process; dropout must not.
    set_seed(options.seed + accelerator.process_index)
    collate_fn = family.make_collator(processor, prompt=record.prompt, max_length=options.max_length)
    if line := data.describe_cut(processor.tokenizer, options.max_length):
        say(accelerator, line)
    if checkpoint is None:
        if options.init_lora_weights == "eva":
            look_at_data(model, accelerator, data.train, collate_fn)
        fit_batch_size(options, accelerator, model, optimizer, collate_fn, data)
        plan = _make_plan(options, len(data.train), accelerator)
        record.options = describe_options(options)
    loader = _make_loader(options, data.train, plan, collate_fn, accelerator.device)
    run = Run(options, record, accelerator, model, processor, optimizer, lr_scheduler, plan, loader)
    if checkpoint is not None:
        resume_run(run, checkpoint)
    else:
        run.progress.note_errors(data.skipped)
    return _make_trainer(run, family, data, collate_fn, lock)


def _open_output_dir(options: TrainOptions, accelerator: Accelerator) -> OutputLock:
    """Make the output folder and keep other runs out of it; the main process does it for all."""
    lock = OutputLock(options.output_dir)
    if Path(options.model_id).is_dir() and options.output_dir.resolve() == Path(options.model_id).resolve():
        raise UsageError(
            f"--output_dir {options.output_dir}: holds the base, --model_id; choose another folder"
        )
    if accelerator.is_main_process:
        try:
            if line := lock.acquire():
                say(accelerator, line)
        except FileExistsError as error:
            raise UsageError(f"--output_dir {options.output_dir}: is no folder") from error
        except OSError as error:
            raise UsageError(f"--output_dir {options.output_dir}: {error.strerror}") from error
        clear_partial(options.output_dir)
    return lock


def _make_plan(options: TrainOptions, num_samples: int, accelerator: Accelerator) -> BatchPlan:
    return BatchPlan(
        num_samples,
        options.batch_size,
        options.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        options.epochs,
        options.seed,
    )


def _make_loader(
    options: TrainOptions,
    pairs: list[Pair],
    plan: BatchPlan,
    collate_fn: Callable[[Sequence[dict]], Batch],
    device: torch.device,
) -> DataLoader:
    dataset = CaptionDataset(
        pairs,
        seed=options.seed,
        shuffle_captions=options.shuffle_captions,
        keep_tokens=options.keep_tokens,
        caption_dropout=options.caption_dropout,
    )
    return make_train_dataloader(
        dataset, plan, collate_fn, num_workers=options.num_workers, pin_memory=device.type == "cuda"
    )


def load_trainable(
    options: TrainOptions, family: Family, accelerator: Accelerator, checkpoint: Path | None
) -> tuple[nn.Module, Any]:
    """Load the base and make trainable what `--train_method` names; weights from `checkpoint` if resuming."""
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
    is_lora = options.train_method == "lora"
    parts = [family.parts[part] for part in options.train_parts]
    dtype = options.dtype if options.dtype != "auto" else half if is_lora else "float32"
    quantization = make_quantization_config(options, accelerator.mixed_precision, family.parts)
    with giving_back_memory() if quantization else nullcontext():
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
        start_lora(model, options, accelerator.device, checkpoint)
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


def _make_trainer(
    run: Run,
    family: Family,
    data: TrainingData,
    collate_fn: Callable[[Sequence[dict]], Batch],
    lock: OutputLock,
) -> Trainer:
    options, accelerator = run.options, run.accelerator
    if accelerator.is_main_process:
        print_settings(options, run.record, run.plan, accelerator)
    if options.log_with:
        name = options.name or options.output_dir.name
        start_trackers(accelerator, name, run.record.options, run.progress)
    log = RunLog(accelerator, options.output_dir, run.plan.first_step)
    evaluator = Evaluator(run, family, data.validation, log, collate_fn)
    sampler = Sampler(run, family, data, log)
    return Trainer(run, evaluator, sampler, Saver(run), log, lock)


def _base_name(options: TrainOptions) -> str:
    """Return the base as others can find it: the hub's id, or the absolute path of a folder."""
    folder = Path(options.model_id)
    return str(folder.resolve()) if folder.is_dir() else options.model_id


def _name_base(model: nn.Module, options: TrainOptions) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = _base_name(options)
    config.revision = options.revision

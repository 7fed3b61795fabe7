"""Makes a trainer from options: reads data, finds the checkpoint, loads the model, makes a run's parts."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from caption_train.adapters.initialization import initialize_from_data
from caption_train.adapters.lora import count_parameters
from caption_train.adapters.record import Base, TrainingRecord, describe_options
from caption_train.config.training import TrainOptions
from caption_train.data.pairs import Pair
from caption_train.errors import UsageError
from caption_train.families.base import Batch, Family
from caption_train.families.weight_files import find_commit
from caption_train.features.source import FeatureCollator, Keeping
from caption_train.system.console import print_once
from caption_train.system.launcher import notice_launcher
from caption_train.system.lock import OutputLock
from caption_train.system.workers import choose_workers, default_workers, limit_workers
from caption_train.training.batch_size import fit_batch_size
from caption_train.training.checkpoints.find import BEST, forget
from caption_train.training.checkpoints.store import clear_partial, explain_failure
from caption_train.training.distributed.accelerator import make_accelerator, resolve_precision
from caption_train.training.distributed.fsdp import parallelism, prepare, shard
from caption_train.training.distributed.ranks import check_same_on_all_ranks, raise_on_all_ranks
from caption_train.training.keeping import start_keeping
from caption_train.training.loop import Trainer
from caption_train.training.model import load_trainable, make_record, resolve_options
from caption_train.training.monitor.console import print_settings
from caption_train.training.monitor.log import RunLog
from caption_train.training.monitor.samples import PreviewCaptioner
from caption_train.training.monitor.trackers import check_trackers, start_trackers
from caption_train.training.monitor.validation import Evaluator
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer
from caption_train.training.results import check_hub
from caption_train.training.resume import adopt_batch_size, check_same_run, find_resume_point, resume_run
from caption_train.training.run.ahead import Ahead
from caption_train.training.run.batch_plan import BatchPlan
from caption_train.training.run.batches import CaptionDataset, make_train_dataloader
from caption_train.training.run.data import TrainingData, read_training_data
from caption_train.training.run.lengths import describe_padding, measure_lengths
from caption_train.training.run.run import TrainingRun
from caption_train.training.saving import CheckpointSaver


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        options: the options, with a resumed run's batch size.
        record: what the saved model will say about where it comes from.
        checkpoint: the checkpoint to resume from, or None.
        parts: of the model, part → pattern of module names.
    """

    options: TrainOptions
    record: TrainingRecord
    checkpoint: Path | None
    parts: Mapping[str, str]

    def list_facts(self) -> dict[str, Any]:
        """Return what must be equal in every process besides the flags, because machines may differ in it."""
        return {
            **{f"dataset's {name}": value for name, value in self.record.dataset.items()},
            **self.record.versions,
            "the checkpoint to go on from": self.checkpoint and self.checkpoint.name,
        }


def prepare_training(options: TrainOptions, family: Family, ahead: Ahead | None = None) -> Trainer:
    """Prepare everything that a run needs. Cheap checks of flags and data come before the model is loaded.

    Args:
        options: as the user gave them.
        family: the model's family.
        ahead: what began to read the datasets already, if anything did.

    Returns:
        A trainer, which holds the lock on the output folder until it is finished.

    Raises:
        UsageError, CaptionTrainError: in every process of the run, whichever of them failed.
    """
    options, lines = resolve_precision(options)
    accelerator = make_accelerator(options)
    print_once(accelerator, *lines)
    notice_launcher(accelerator.num_processes)
    with raise_on_all_ranks(accelerator):
        options, base = resolve_options(options, family)
        lock = _open_output_dir(options, accelerator)
    try:
        return _prepare(options, family, base, accelerator, lock, ahead)
    except BaseException:
        lock.abandon()
        raise


def _prepare(
    options: TrainOptions,
    family: Family,
    base: Base,
    accelerator: Accelerator,
    lock: OutputLock,
    ahead: Ahead | None,
) -> Trainer:
    check_same_on_all_ranks(accelerator, describe_options(options))
    data = read_training_data(options, accelerator, ahead)
    start = _decide_start(options, family, base, data, accelerator)
    model, processor = _load(start, family, base, data, accelerator)
    collate_fn = family.make_collator(processor, prompt=base.prompt, max_length=options.max_length)
    start = _limit_workers(start, lambda: family.measure_inputs(processor, base.prompt), accelerator, data)
    run = _make_run(start, model, processor, family, data, collate_fn, accelerator)
    if start.checkpoint is not None:
        resume_run(run, start.checkpoint)
    else:
        run.progress.note_errors(data.skipped)
    return _make_trainer(run, family, data, collate_fn, lock)


def _decide_start(
    options: TrainOptions, family: Family, base: Base, data: TrainingData, accelerator: Accelerator
) -> Start:
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            check_trackers(options.log_with, options.output_dir)
            check_hub(options.push_to_hub)
        checkpoint, lines = find_resume_point(options)
        print_once(accelerator, *lines)
        if options.auto_batch_size and checkpoint is not None:
            options = adopt_batch_size(options, checkpoint)
        start = Start(options, make_record(options, family, base, data), checkpoint, base.facts.parts)
        if checkpoint is not None:
            print_once(accelerator, *check_same_run(checkpoint, start.record, options.resume_anyway))
    check_same_on_all_ranks(accelerator, start.list_facts())
    return start


def _load(
    start: Start, family: Family, base: Base, data: TrainingData, accelerator: Accelerator
) -> tuple[nn.Module, Any]:
    options, record = start.options, start.record
    set_seed(options.seed)
    with raise_on_all_ranks(accelerator):
        model, processor = load_trainable(options, family, base.facts, accelerator, start.checkpoint)
        # A prompt too long for this model is better refused here than in a process that reads images.
        prompts = set(filter(None, (data.train + data.validation).prompts()))
        family.set_up(processor, options.model_id, base.settings, [base.prompt, *sorted(prompts)])
    print_once(accelerator, *base.facts.notes, *base.changes, *family.describe_inputs(processor))
    record.settings = family.read_settings(processor)
    record.base_commit = find_commit(options.model_id, options.revision)
    record.trainable_parameters, record.total_parameters = count_parameters(model)
    return model, processor


def _limit_workers(
    start: Start, measure_inputs: Callable[[], int], accelerator: Accelerator, data: TrainingData
) -> Start:
    """Return the start with as many `--num_workers` as the shared memory of this machine has room for."""
    options = start.options
    asked = options.num_workers
    # Those of this machine: other machines have cores of their own.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if asked == "auto":
        asked = choose_workers(accelerator.device, data.measure_megapixels(), processes)
        print_once(accelerator, f"--num_workers auto: {asked}")
    elif "num_workers" not in options.sources:
        asked = asked or default_workers(accelerator.device, processes)
    workers, line = limit_workers(asked, lambda: measure_inputs() * options.batch_size)
    if line:
        print_once(accelerator, line)
    return replace(start, options=replace(options, num_workers=workers))


def _make_run(
    start: Start,
    model: nn.Module,
    processor: Any,
    family: Family,
    data: TrainingData,
    collate_fn: Callable[[Sequence[dict]], Batch],
    accelerator: Accelerator,
) -> TrainingRun:
    options, record = start.options, start.record
    lengths = measure_lengths(family, processor, data, options) if options.group_by_length else None
    plan = _make_plan(options, len(data.train), accelerator, lengths)
    if parallelism(accelerator) == "FSDP":
        model = shard(model, accelerator)
    optimizer = make_optimizer(options, model, start.parts)
    lr_scheduler = make_lr_scheduler(options, optimizer, plan.total_steps)
    model, optimizer = prepare(accelerator, model, optimizer)
    keeping = None
    if options.cache_features:
        keeping = start_keeping(options, accelerator, model, processor, family, data, record.prompt)
    # Until here all processes had the same seed, for equal LoRAs. Dropout must differ between them.
    set_seed(options.seed + accelerator.process_index)
    if line := data.describe_cut(partial(family.tokenize_caption, processor), options.max_length):
        print_once(accelerator, line)
    if start.checkpoint is None:
        if options.init_lora_weights == "eva":
            initialize_from_data(model, accelerator, data.train, collate_fn)
        # Only a new run: a resumed one keeps the batch size that was found when it started.
        options = fit_batch_size(options, accelerator, model, optimizer, collate_fn, data, keeping)
        plan = _make_plan(options, len(data.train), accelerator, lengths)
        record.options = describe_options(options)
    if lengths:
        print_once(accelerator, describe_padding(plan))
    collate = FeatureCollator(family, collate_fn) if keeping else collate_fn
    loader = _make_loader(options, data.train, plan, collate, accelerator.device, keeping)
    return TrainingRun(
        *(options, record, accelerator, model, processor, optimizer, lr_scheduler, plan, loader, keeping)
    )


def _open_output_dir(options: TrainOptions, accelerator: Accelerator) -> OutputLock:
    """Make the output folder and lock it against other runs; the main process does this for all."""
    lock = OutputLock(options.output_dir)
    for name, what, values in (
        ("model_id", "the base", [options.model_id]),
        ("dataset_dir", "the images", [folder for folder, _ in options.datasets]),
        ("validation_dir", "validation images", [options.validation_dir]),
        ("init_adapter", "the LoRA to start from, which would be replaced", [options.init_adapter]),
    ):
        if any(
            value and Path(value).is_dir() and options.output_dir.resolve() == Path(value).resolve()
            for value in values
        ):
            raise UsageError(
                f"--output_dir {options.output_dir}: holds {what}, --{name}; choose another folder"
            )
    if accelerator.is_main_process:
        try:
            if line := lock.acquire():
                print_once(accelerator, line)
        except FileExistsError as error:
            raise UsageError(f"--output_dir {options.output_dir}: is no folder") from error
        except OSError as error:
            raise UsageError(f"--output_dir {options.output_dir}: {error.strerror}") from error
        clear_partial(options.output_dir)
    return lock


def _make_plan(
    options: TrainOptions, num_samples: int, accelerator: Accelerator, lengths: Sequence[int] | None
) -> BatchPlan:
    return BatchPlan(
        num_samples,
        options.batch_size,
        options.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        options.epochs,
        options.seed,
        lengths=lengths,
    )


def _make_loader(
    options: TrainOptions,
    pairs: Sequence[Pair],
    plan: BatchPlan,
    collate_fn: Callable[[Sequence[dict]], Batch],
    device: torch.device,
    keeping: Keeping | None,
) -> DataLoader:
    dataset = CaptionDataset(
        pairs,
        seed=options.seed,
        shuffle_captions=options.shuffle_captions,
        keep_tokens=options.keep_tokens,
        caption_dropout=options.caption_dropout,
        open_item=keeping and keeping.source.open,
    )
    return make_train_dataloader(
        dataset,
        plan,
        collate_fn,
        num_workers=options.num_workers,
        worker_timeout=options.worker_timeout,
        pin_memory=device.type == "cuda",
    )


def _make_trainer(
    run: TrainingRun,
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
        with raise_on_all_ranks(accelerator):
            start_trackers(accelerator, name, run.record.options, run.progress, options.output_dir)
    with raise_on_all_ranks(accelerator):
        log = RunLog(accelerator, options.output_dir, run.plan.first_step)
        if accelerator.is_main_process and run.plan.first_step == 0:
            with explain_failure(options.output_dir, BEST):
                forget(options.output_dir, BEST)
    evaluator = Evaluator(
        run, family, data, log, FeatureCollator(family, collate_fn) if run.keeping else collate_fn
    )
    sampler = PreviewCaptioner(run, family, data, log, evaluator.tables)
    return Trainer(run, evaluator, sampler, CheckpointSaver(run), log, lock)

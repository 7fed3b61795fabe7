"""From options to a run that is ready to train: data, model, LoRA, optimizer, and where it stood."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader

from caption_train.adapters.initialization import initialize_from_data
from caption_train.adapters.lora import count_parameters
from caption_train.adapters.record import describe_options
from caption_train.config.training import TrainOptions
from caption_train.data.pairs import Pair
from caption_train.errors import UsageError
from caption_train.families.base import Batch, Family
from caption_train.system.console import print_once
from caption_train.system.files import find_commit
from caption_train.system.launcher import notice_launcher
from caption_train.system.lock import OutputLock
from caption_train.training.batch_size import fit_batch_size
from caption_train.training.checkpoints.store import clear_partial
from caption_train.training.distributed.accelerator import make_accelerator
from caption_train.training.distributed.fsdp import parallelism, prepare, shard
from caption_train.training.distributed.ranks import check_same_on_all_ranks, raise_on_all_ranks
from caption_train.training.loop import Trainer
from caption_train.training.model import list_facts, load_trainable, make_record
from caption_train.training.monitor.console import print_settings
from caption_train.training.monitor.log import RunLog
from caption_train.training.monitor.samples import PreviewCaptioner
from caption_train.training.monitor.trackers import check_trackers, start_trackers
from caption_train.training.monitor.validation import Evaluator
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer
from caption_train.training.resume import adopt_batch_size, check_same_run, find_resume_point, resume_run
from caption_train.training.run.batch_plan import BatchPlan
from caption_train.training.run.batches import CaptionDataset, make_train_dataloader
from caption_train.training.run.data import TrainingData, read_training_data
from caption_train.training.run.run import TrainingRun
from caption_train.training.saving import CheckpointSaver


def prepare_training(options: TrainOptions, family: Family) -> Trainer:
    """Make everything a run needs. Cheap checks come first: flags and data before the model loads."""
    accelerator = make_accelerator(options)
    notice_launcher(accelerator.num_processes)
    with raise_on_all_ranks(accelerator):
        lock = _open_output_dir(options, accelerator)
    try:
        return _prepare(options, family, accelerator, lock)
    except BaseException:
        lock.abandon()
        raise


def _prepare(options: TrainOptions, family: Family, accelerator: Accelerator, lock: OutputLock) -> Trainer:
    check_same_on_all_ranks(accelerator, describe_options(options))
    data = read_training_data(options, accelerator)
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            check_trackers(options.log_with)
        checkpoint = find_resume_point(options, accelerator)
        if options.auto_batch_size and checkpoint is not None:
            adopt_batch_size(options, checkpoint)
        record = make_record(options, family, data)
        if checkpoint is not None:
            check_same_run(checkpoint, record, accelerator, options.resume_anyway)
    check_same_on_all_ranks(accelerator, list_facts(record, checkpoint))
    set_seed(options.seed)
    with raise_on_all_ranks(accelerator):
        model, processor = load_trainable(options, family, accelerator, checkpoint)
        # A prompt too long for this model is better refused here than in a process that reads images.
        longest = max((pair.prompt or "" for pair in data.train + data.validation), key=len)
        family.encode(processor, [Image.new("RGB", (32, 32))] * 2, [record.prompt, longest or record.prompt])
    record.base_commit = find_commit(options.model_id, options.revision)
    record.trainable_parameters, record.total_parameters = count_parameters(model)
    plan = _make_plan(options, len(data.train), accelerator)
    if parallelism(accelerator) == "FSDP":
        model = shard(model, accelerator)
    optimizer = make_optimizer(options, model)
    lr_scheduler = make_lr_scheduler(options, optimizer, plan.total_steps)
    model, optimizer = prepare(accelerator, model, optimizer)
    # The LoRA starts the same on every process; dropout must not.
    set_seed(options.seed + accelerator.process_index)
    collate_fn = family.make_collator(processor, prompt=record.prompt, max_length=options.max_length)
    if line := data.describe_cut(processor.tokenizer, options.max_length):
        print_once(accelerator, line)
    if checkpoint is None:
        if options.init_lora_weights == "eva":
            initialize_from_data(model, accelerator, data.train, collate_fn)
        fit_batch_size(options, accelerator, model, optimizer, collate_fn, data)
        plan = _make_plan(options, len(data.train), accelerator)
        record.options = describe_options(options)
    loader = _make_loader(options, data.train, plan, collate_fn, accelerator.device)
    run = TrainingRun(options, record, accelerator, model, processor, optimizer, lr_scheduler, plan, loader)
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
                print_once(accelerator, line)
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
        start_trackers(accelerator, name, run.record.options, run.progress)
    log = RunLog(accelerator, options.output_dir, run.plan.first_step)
    evaluator = Evaluator(run, family, data.validation, log, collate_fn)
    sampler = PreviewCaptioner(run, family, data, log)
    return Trainer(run, evaluator, sampler, CheckpointSaver(run), log, lock)

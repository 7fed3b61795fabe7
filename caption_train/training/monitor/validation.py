"""Measures the model in training on images that it is not trained on, and decides when to stop early."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from caption_train.data.columns.table import Pairs
from caption_train.data.images import ImageError
from caption_train.data.split import drop_repeats, rank_images
from caption_train.families.base import Batch, Family
from caption_train.features.source import attach_rows
from caption_train.metrics.coco import score_captions
from caption_train.system.console import ProgressBar, print_once
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.signals import ignore_in_worker
from caption_train.system.workers import reading
from caption_train.training.checkpoints.find import describe_latest
from caption_train.training.distributed.fsdp import unsharded
from caption_train.training.monitor.log import RunLog
from caption_train.training.monitor.report import RunReport
from caption_train.training.monitor.tables import VALIDATION, CaptionTables
from caption_train.training.run.batch_plan import is_due
from caption_train.training.run.batches import CaptionDataset, Collate, open_alone
from caption_train.training.run.data import TrainingData
from caption_train.training.run.run import TrainingRun

MAX_NEW_TOKENS = 64


@dataclass
class Question:
    """An image to caption for the metrics, what the model is asked, and all captions that it has."""

    image: Path
    prompt: str
    references: list[str] = field(default_factory=list)


class Evaluator:
    """Measures loss and caption metrics on fixed validation pairs, and remembers the best step.

    A row that is repeated counts once.
    """

    def __init__(
        self,
        run: TrainingRun,
        family: Family,
        data: TrainingData,
        log: RunLog,
        collate_fn: Callable[[Sequence[dict]], Batch],
    ) -> None:
        self.run, self.family, self.log, self.collate_fn = run, family, log, collate_fn
        self.pairs = drop_repeats(data.validation)
        self.questions = _list_questions(self.pairs, run)[: run.options.metric_samples]
        self.captions: dict[tuple[Path, str], str] = {}
        shown = [((question.image, question.prompt), question.references) for question in self.questions]
        self.report = RunReport(run, shown, is_wanted=bool(self.pairs))
        self.tables = CaptionTables(run, self.report)

    def before_first_step(self) -> None:
        """Measure what the run starts from, to compare with. It is no candidate for the best."""
        if self.pairs:
            values = self.run.progress.base_evaluation = self.evaluate()
            self.log.write(0, 0, {f"eval_{k}": v for k, v in values.items()})
            self._say(0, values, is_best=False)
            self._show(0, values)

    def after_step(self, step: int) -> None:
        """Evaluate if it is due after this 0-based optimizer step; by default, at the end of every epoch."""
        if not self.pairs:
            return
        options, plan, done = self.run.options, self.run.plan, step + 1
        every_epochs = options.eval_every_n_epochs
        if not (every_epochs or options.eval_every_n_steps):
            every_epochs = 1
        ends_epoch = done % plan.steps_per_epoch == 0
        if is_due(options.eval_every_n_steps, done) or (
            ends_epoch and is_due(every_epochs, plan.epoch_of(step))
        ):
            values = self.run.progress.evaluation = self.evaluate()
            is_best = self._update_best(values)
            self.log.write(done, plan.epoch_of(step), {f"eval_{k}": v for k, v in values.items()})
            self._say(done, values, is_best)
            self._show(done, values)

    def evaluate(self) -> dict[str, float]:
        """Return the loss per token, and the metrics asked for, over all processes."""
        with unsharded(self.run.model):
            values = {"loss": self._measure_loss()}
            if self.run.options.metrics:
                values |= self._score()
        return values

    @cached_property
    def _loader(self) -> DataLoader:
        """The batches of this process. Workers stay from one validation to the next."""
        run, accelerator = self.run, self.run.accelerator
        share = range(accelerator.process_index, len(self.pairs), accelerator.num_processes)
        workers = run.options.num_workers
        return DataLoader(
            CaptionDataset(self.pairs, open_item=run.keeping and run.keeping.source.open),
            batch_sampler=[[(0, index) for index in keys] for keys in _cut(share, run.plan.batch_size)],
            collate_fn=Collate(self.collate_fn),
            num_workers=workers,
            persistent_workers=workers > 0,
            timeout=run.options.worker_timeout if workers else 0,
            pin_memory=accelerator.device.type == "cuda",
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator().manual_seed(0),
        )

    def _measure_loss(self) -> float:
        run, accelerator, loader = self.run, self.run.accelerator, self._loader
        losses, tokens, errors, latest = 0.0, 0, [], partial(describe_latest, run.options.output_dir)
        with (
            self._progress_bar("validating", loader.batch_sampler) as bar,
            evaluating(run) as model,
            reading(loader, latest) as batches,
        ):
            for batch in batches:
                with run.encoding(batch.inputs) as inputs:
                    inputs = move_batch(inputs, accelerator.device, model_dtype(model))
                    # The loss is a mean over tokens; sums over batches need it times their number.
                    losses += model(**inputs).loss.item() * batch.label_tokens
                tokens += batch.label_tokens
                errors += batch.errors
                bar.update(count=len(batch.files))
        shares = gather_object([(losses, tokens, errors)])
        self._note_errors([error for share in shares for error in share[2]])
        total = sum(share[1] for share in shares)
        return sum(share[0] for share in shares) / total if total else math.nan

    def _note_errors(self, errors: Sequence[str]) -> None:
        for error in self.run.progress.note_errors(errors):
            print_once(self.run.accelerator, f"skipped {error}")

    def _score(self) -> dict[str, float]:
        """Caption the images of `questions`, and compare each caption with its references."""
        run, accelerator = self.run, self.run.accelerator
        rows = []
        share = self.questions[accelerator.process_index :: accelerator.num_processes]
        parts = list(_cut(share, run.plan.batch_size))
        with self._progress_bar("captioning for metrics", parts) as bar:
            for part in parts:
                rows += self._caption(part)
                bar.update(count=len(part))
        # Sorted, so that the rounding of sums does not depend on the number of processes.
        rows = sorted(gather_object(rows))
        keys = {str(key := (question.image, question.prompt)): key for question in self.questions}
        self.captions = {keys[row[0]]: row[1] for row in rows}
        if not rows:
            return {}
        return score_captions([row[1] for row in rows], [row[2] for row in rows], run.options.metrics)

    def _caption(self, questions: Sequence[Question]) -> list[tuple[str, str, list[str]]]:
        """Return what identifies each question whose image can be read, its caption and its references."""
        opened = []
        for question in questions:
            try:
                opened.append((question, open_item(self.run, question.image)))
            except ImageError:
                # It was reported when the loss was measured.
                continue
        items, prompts = [item for _, item in opened], [question.prompt for question, _ in opened]
        captions = caption_items(self.run, self.family, items, prompts)
        return [
            (str((question.image, question.prompt)), caption, question.references)
            for (question, _), caption in zip(opened, captions, strict=True)
        ]

    def _progress_bar(self, label: str, parts: Iterable[Sized]) -> ProgressBar:
        shown = self.run.accelerator.is_local_main_process
        return ProgressBar(sum(map(len, parts)), label, "image", shown=shown, leave=False)

    def _update_best(self, values: dict[str, float]) -> bool:
        """Remember a new best value, or count towards early stopping; return whether it is the best."""
        run, progress = self.run, self.run.progress
        name, patience = run.options.metric_for_best, run.options.early_stopping_patience
        value, best = values.get(name, math.nan), progress.best_value
        is_best = math.isfinite(value) and (
            best is None or (value < best if name == "loss" else value > best)
        )
        if is_best:
            progress.best_value, progress.best_step = value, progress.global_step
            progress.evaluations_since_best = 0
        else:
            progress.evaluations_since_best += 1
            progress.stopped_early = patience is not None and progress.evaluations_since_best >= patience
        return is_best

    def _show(self, step: int, values: dict[str, float]) -> None:
        self.report.update(step, self.captions, values)
        references = {(question.image, question.prompt): question.references for question in self.questions}
        self.tables.write(VALIDATION, step, self.captions, references)

    def _say(self, step: int, values: dict[str, float], is_best: bool) -> None:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        note = " (before training)" if step == 0 else " (best so far)" if is_best else ""
        lines = [f"step {step}: validation {scores}{note}"]
        if self.run.progress.stopped_early:
            lines.append(
                f"--early_stopping_patience: {self.run.options.metric_for_best} was best at step "
                f"{self.run.progress.best_step}; stopping"
            )
        print_once(self.run.accelerator, *lines)


def _list_questions(pairs: Pairs, run: TrainingRun) -> list[Question]:
    """Return what `--metrics` captions: each image and prompt once, in the order of `rank_images`.

    The order of the folder would show the model one category only, if folders or names are categories.
    """
    found: dict[tuple[str, str], Question] = {}
    for pair, digest in zip(pairs, pairs.digests(), strict=True):
        prompt = pair.prompt or run.record.prompt
        question = found.setdefault((digest, prompt), Question(pair.image, prompt))
        question.references.append(pair.caption)
    order = {d: place for place, d in enumerate(rank_images((d for d, _ in found), run.options.seed))}
    return [found[key] for key in sorted(found, key=lambda key: order[key[0]])]


@contextmanager
def evaluating(run: TrainingRun) -> Iterator[torch.nn.Module]:
    """Yield the model without wrapper and dropout; then restore train mode and the random state."""
    model, device = run.accelerator.unwrap_model(run.model), run.accelerator.device
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield model
    finally:
        model.train()


def open_item(run: TrainingRun, path: Path) -> dict[str, Any]:
    """Return an image, or its kept features, for `caption_items`; raise ImageError if it cannot be read."""
    return (run.keeping.source.open if run.keeping else open_alone)(path)


def caption_items(
    run: TrainingRun, family: Family, items: Sequence[dict[str, Any]], prompts: Sequence[str | None]
) -> list[str]:
    """Caption images as in training.

    Args:
        run: the run with the model in training.
        family: the model's family.
        items: made by `open_item`.
        prompts: the prompt of each image; None means the prompt of the run.
    """
    if not items:
        return []
    prompts = [prompt or run.record.prompt for prompt in prompts]
    batch = family.encode(run.processor, [item["image"] for item in items], prompts)
    if run.keeping:
        batch = attach_rows(family, batch, items)
    with evaluating(run) as model, run.encoding(batch) as batch:
        batch = move_batch(batch, run.accelerator.device, model_dtype(model))
        generated = family.generate(model, run.processor, batch, max_new_tokens=MAX_NEW_TOKENS)
    return [caption.text for caption in generated]


def _cut(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]

"""Captions shards with one or several processes, from the plan to the printed summary."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from caption_train.adapters.record import Base, read_adapter, read_request, resolve_base
from caption_train.captioning.outputs import finish_caption
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.shards.work import Counts, ShardWork
from caption_train.captioning.storage.shard import Shard as Part
from caption_train.captioning.summary import CaptioningSummary
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from caption_train.families.base import Family
from caption_train.metrics.output_health import find_remarks
from caption_train.shards.output import OutputFolder
from caption_train.shards.places import Shard, find_shards
from caption_train.shards.records import NewCaption
from caption_train.system.console import (
    ProgressBar,
    count_things,
    escape_unprintable,
    is_quiet,
    print_line,
    print_problem,
)
from caption_train.system.launcher import notice_launcher
from caption_train.system.processes import join_processes
from caption_train.system.signals import Terminated, raising_terminated
from caption_train.system.workers import choose_workers, explaining_dead_worker

if TYPE_CHECKING:
    from caption_train.captioning.shards.stream import Asked

MOST_NAMES = 5


def caption_shards(options: CaptionOptions, family: Family) -> int:
    """Caption the shards that `options.images` names, and print a summary.

    Returns:
        The exit code. 0: all is well. 1: an image or a shard could not be read, or a shard has changed since
        it was captioned. 130 or 143: Ctrl-C or SIGTERM; the same command continues from there.

    Raises:
        UsageError: the options cannot work; raised before a model is loaded.
        CaptionTrainError: the model cannot be loaded, or a shard cannot be written.
    """
    job = ShardJob(options, family)
    try:
        with raising_terminated():
            return job.run()
    except KeyboardInterrupt as interrupt:
        if job.processes.is_main:
            print_line(
                f"Interrupted: {job.summary.written:,} captions are written down; the same command goes on "
                "from there"
            )
        return 143 if isinstance(interrupt, Terminated) else 130
    finally:
        job.work.close()
        job.processes.leave()


@dataclass(frozen=True)
class ShardPlan:
    """What a run over shards works on: the shards in order, and the model with its prompt."""

    shards: Sequence[Shard]
    base: Base


class ShardJob:
    """One process's share of the shards. The main process also makes the plan and prints the summary."""

    def __init__(self, options: CaptionOptions, family: Family) -> None:
        self.options, self.family = options, family
        self.processes = join_processes()
        notice_launcher(self.processes.count)
        if options.limit and self.processes.count > 1:
            raise UsageError("--limit with shards works in one process: start it without torchrun")
        self.output = OutputFolder(options.output_shards, options.output_format)
        self.plan = self.processes.share(self._make_plan)
        self.work = ShardWork(options, family, self.output, self.plan.base.prompt)
        self.summary = CaptioningSummary(adds=options.existing in ("append", "prepend"))

    def run(self) -> int:
        """Caption this process's shards and wait for the others; return the exit code."""
        share = self.plan.shards[self.processes.rank :: self.processes.count]
        asked = self.work.ask(share)
        first = next(asked, None)
        if first is not None:
            self._caption(chain([first], asked), share)
        self.work.close()
        summaries, counts = self.processes.gather(self.summary), self.processes.gather(self.work.counts)
        total, found = sum(summaries, CaptioningSummary()), sum(counts, Counts())
        total.kept = found.kept
        total.unreadable += found.problems
        if self.processes.is_main:
            print_line(*total.lines("image"), *self._describe_shards(found))
            if is_quiet():
                print_problem(*total.problems())
        # Only the main process returns 1: launchers end all processes as soon as one of them fails.
        return 1 if total.unreadable and self.processes.is_main else 0

    def _make_plan(self) -> ShardPlan:
        options, family = self.options, self.family
        shards = find_shards(options.images, "--images")
        if part := Part.parse(options.shard):
            shards = shards[part.index - 1 :: part.count]
        adapter = read_adapter(options.peft_model) if options.peft_model else None
        prompt, settings = read_request(options, family)
        base = resolve_base(family, options.base_model, options.revision, prompt, adapter, settings=settings)
        self.output.prepare(shards)
        return ShardPlan(shards, base)

    def _caption(self, asked: Iterator[Asked], share: Sequence[Shard]) -> None:
        start, counts = time.monotonic(), self.work.counts
        results = self._generate(asked)
        bar = ProgressBar(len(share), "captioning", "shard", shown=self.processes.is_main)
        with explaining_dead_worker(self.options.num_workers), bar:
            for result in results:
                self._handle(result)
                self.summary.seconds = time.monotonic() - start
                rate = self.summary.written / self.summary.seconds
                finished = counts.shards + counts.before + counts.busy
                note = f"{count_things(self.summary.written, 'image')} ({rate:.2f} images/s)"
                bar.update(note, finished - bar.done)

    def _generate(self, asked: Iterator[Asked]) -> Iterator[CaptionResult | Unreadable]:
        """Load the model and caption with it."""
        from caption_train.captioning.engines.graphs import DecodeGraphs
        from caption_train.captioning.generate import CaptionRun, find_dtype, load_captioner, make_generation
        from caption_train.captioning.shards.stream import caption_stream
        from caption_train.system.devices import choose_device

        options, main = self.options, self.processes.is_main
        device = choose_device(
            options.device, local_rank=self.processes.local_rank, processes=self.processes.count
        )
        if options.cuda_graphs and device.type != "cuda":
            raise UsageError(f"--cuda_graphs: needs an NVIDIA GPU, and this runs on {device}: leave it out")
        if main:
            adapter = f" and {options.peft_model}" if options.peft_model else ""
            precision = str(find_dtype(options, device)).removeprefix("torch.")
            print_line(
                f"Captioning {count_things(len(self.plan.shards), 'shard')} with "
                f"{self.plan.base.model_id}{adapter} on {device} in {precision}"
            )
        model, processor = load_captioner(self.family, self.plan.base, options, device)
        if main:
            print_line(*self.plan.base.changes, *self.family.describe_inputs(processor))
        generation = make_generation(options, self.plan.base.prompt)
        workers = options.num_workers
        if workers == "auto":
            # Images in shards are small: nobody is asked for the size of each.
            workers = choose_workers(device, 1.0, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            if main:
                print_line(f"--num_workers auto: {workers}")
        run = CaptionRun(
            *(self.family, model, processor, generation, workers, options.worker_timeout),
            keeping=None,
            graphs=DecodeGraphs(model) if options.cuda_graphs else None,
            draft=options.draft_decode,
        )
        return caption_stream(run, asked, options.batch_size)

    def _handle(self, result: CaptionResult | Unreadable) -> None:
        """Write down and count the result of one image."""
        if isinstance(result, Unreadable):
            self.work.take(NewCaption(-1, None, result.reason))
            return
        generated = result.generated
        text = finish_caption(generated.text, self.options)
        answer = self.family.parse_answer(generated.text, self.plan.base.prompt, result.size)
        remarks = find_remarks(generated)
        self.work.take(NewCaption(-1, text, None, list(remarks), answer))
        self.summary.count(str(result.image), remarks)

    def _describe_shards(self, counts: Counts) -> list[str]:
        """Return lines about the shards: what this run did, and which of all are missing."""
        lines = [f"{count_things(counts.shards, 'shard')} written to {escape_unprintable(self.output.place)}"]
        if counts.before:
            lines[0] += f", {counts.before:,} done before"
        if counts.busy:
            lines[0] += f", {counts.busy:,} being captioned by other runs"
        if counts.other:
            lines.append(
                f"{count_things(counts.other, 'shard')} done before with another model, prompt or other "
                "flags: delete them to caption them again"
            )
        missing = [shard for shard in self.plan.shards if not self.output.has(shard)]
        if missing:
            names = [escape_unprintable(self.output.name_of(shard)) for shard in missing[:MOST_NAMES]]
            more = f" and {len(missing) - MOST_NAMES:,} more" if len(missing) > MOST_NAMES else ""
            lines.append(
                f"{count_things(len(missing), 'shard')} of {len(self.plan.shards):,} still missing: "
                f"{', '.join(names)}{more}"
            )
        return lines

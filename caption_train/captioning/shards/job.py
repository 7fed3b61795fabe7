"""Captions shards with one or several processes, from the plan to the printed summary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

from caption_train.adapters.record import Base
from caption_train.captioning.engines.choose import make_engine
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.outputs import finish_caption
from caption_train.captioning.plan import CaptionResult, Unreadable, find_base
from caption_train.captioning.prompts import Task
from caption_train.captioning.shards.prompts import ShardPrompts
from caption_train.captioning.shards.units import Counts
from caption_train.captioning.shards.work import ShardWork
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
from caption_train.system.workers import explaining_dead_worker

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
        with ExitStack() as closing:
            # The last one first; see caption_folder.
            closing.callback(job.processes.leave)
            closing.callback(job.work.close)
            if job.engine:
                closing.callback(job.engine.close)


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
        self.prompts: ShardPrompts | None = None
        self.plan = self.processes.share(self._make_plan)
        self.prompts = self.prompts or ShardPrompts(options, family, self.plan.base.prompt)
        self.work = ShardWork(options, self.output, self.prompts)
        self.summary = CaptioningSummary(adds=options.existing in ("append", "prepend"))
        self.engine: Engine | None = None

    def run(self) -> int:
        """Caption this process's shards and wait for the others; return the exit code."""
        share = self.plan.shards[self.processes.rank :: self.processes.count]
        asked = self.work.ask(share)
        first = next(asked, None)
        if first is not None:
            self._caption(chain([first], asked), share)
        self.work.close()
        self.work.counts.own = self.prompts.own
        summaries, counts = self.processes.gather(self.summary), self.processes.gather(self.work.counts)
        total, found = sum(summaries, CaptioningSummary()), sum(counts, Counts())
        total.kept = found.kept
        total.unreadable += found.problems
        if self.processes.is_main:
            thing = "caption" if self.options.prompts else "image"
            print_line(*self.prompts.describe(found.own))
            print_line(*total.lines(thing), *self._describe_shards(found))
            if is_quiet():
                print_problem(*total.problems())
        # Only the main process returns 1: launchers end all processes as soon as one of them fails.
        return 1 if total.unreadable and self.processes.is_main else 0

    def _make_plan(self) -> ShardPlan:
        options, family = self.options, self.family
        shards = find_shards(options.images, "--images")
        if part := Part.parse(options.shard):
            shards = shards[part.index - 1 :: part.count]
        base = find_base(options, family)
        # Here too, so that what is wrong with them is said once.
        self.prompts = ShardPrompts(options, family, base.prompt)
        self.output.prepare(shards)
        return ShardPlan(shards, base)

    def _caption(self, asked: Iterator[Task], share: Sequence[Shard]) -> None:
        self.engine = self._open_engine()
        start, counts = time.monotonic(), self.work.counts
        results = self.engine.stream(asked)
        bar = ProgressBar(len(share), "captioning", "shard", shown=self.processes.is_main)
        with explaining_dead_worker(self.options.num_workers), bar:
            for result in results:
                self._handle(result)
                self.summary.seconds = time.monotonic() - start
                rate = self.summary.written / self.summary.seconds
                finished = counts.shards + counts.before + counts.busy
                thing = "caption" if self.options.prompts else "image"
                note = f"{count_things(self.summary.written, thing)} ({rate:.2f} {thing}s/s)"
                bar.update(note, finished - bar.done)

    def _open_engine(self) -> Engine:
        """Load what captions, with lines on it before and after."""
        base = self.plan.base
        engine = make_engine(self.family, base, self.options, self.processes)
        if self.processes.is_main:
            shards = count_things(len(self.plan.shards), "shard")
            print_line(f"Captioning {shards} with {engine.describe()}")
        lines = engine.open()
        if self.processes.is_main:
            print_line(*base.changes, *lines)
        return engine

    def _handle(self, result: CaptionResult | Unreadable) -> None:
        """Write down and count the result of one image."""
        if isinstance(result, Unreadable):
            self.work.take(NewCaption(-1, None, result.reason))
            return
        generated = result.generated
        text = finish_caption(generated.text, self.options)
        answer = self.family.parse_answer(generated.text, self.work.next_prompt, result.size)
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

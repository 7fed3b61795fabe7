"""Captions images with one or several processes, from the plan to the printed summary.

torch is imported only if there is an image to caption.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from caption_train.adapters.record import Base
from caption_train.captioning.batches.size import MOST_AT_ONCE
from caption_train.captioning.engines.choose import make_engine
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.outputs import Caption, finish_caption
from caption_train.captioning.plan import (
    CHUNK,
    CaptionPlan,
    CaptionResult,
    Chunk,
    Planner,
    Unreadable,
    make_plan,
    open_keyed_outputs,
)
from caption_train.captioning.prompts import Task
from caption_train.captioning.sinks.writer import CaptionWriter, Written
from caption_train.captioning.storage.image_list import ImageList
from caption_train.captioning.storage.shard import Shard
from caption_train.captioning.summary import CaptioningSummary, describe_meanwhile
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.metrics.output_health import find_remarks
from caption_train.shards.places import names_shards
from caption_train.system.console import (
    ProgressBar,
    escape_unprintable,
    is_quiet,
    print_line,
    print_problem,
    print_result,
)
from caption_train.system.launcher import notice_launcher
from caption_train.system.processes import join_processes
from caption_train.system.signals import Terminated, raising_terminated
from caption_train.system.workers import explaining_dead_worker


def caption_folder(options: CaptionOptions, family: Family) -> int:
    """Caption the images that `options.images` names, and print a summary.

    Returns:
        The exit code. 0: all is well. 1: an image could not be read, all others are captioned. 130 or 143:
        Ctrl-C or SIGTERM; finished captions are written, and the same command continues from there.

    Raises:
        UsageError: the options cannot work; raised before a model is loaded.
        CaptionTrainError: the model cannot be loaded, or a caption cannot be written.
    """
    if options.output_shards is not None:
        from caption_train.captioning.shards.job import caption_shards

        return caption_shards(options, family)
    if names_shards(options.images) and not options.recursive:
        raise UsageError(
            f"--images {escape_unprintable(' '.join(options.images)[:200])}: these are shards: say with "
            "--output_shards FOLDER where their captioned copies go"
        )
    job = CaptionJob(options, family)
    try:
        with raising_terminated():
            return job.run()
    except KeyboardInterrupt as interrupt:
        job.keep_finished()
        job.say_interrupted()
        return 143 if isinstance(interrupt, Terminated) else 130
    except BaseException:
        job.keep_finished()
        raise
    finally:
        with ExitStack() as closing:
            # The last one first. What one raises, or a second Ctrl-C, keeps none of the others from its turn.
            closing.callback(job.processes.leave)
            closing.callback(job.outputs.close)
            closing.callback(job.writer.close)
            if job.engine:
                closing.callback(job.engine.close)


class CaptionJob:
    """One process's share of captioning. The main process also makes the plan and prints the summary."""

    def __init__(self, options: CaptionOptions, family: Family) -> None:
        self.options = options
        self.family = family
        self.processes = join_processes()
        notice_launcher(self.processes.count)
        self.outputs = open_keyed_outputs(options, family, self.processes.rank)
        self.writer = CaptionWriter(self.outputs, self._count)
        self.images = ImageList()
        self.plan: CaptionPlan | None = None
        self.planner: Planner | None = None
        self.lines: list[tuple[int, str]] = []
        self.summary = CaptioningSummary(adds=options.existing in ("append", "prepend"))
        self.bar: ProgressBar | None = None
        self.engine: Engine | None = None
        self.given = 0
        """Captions of the chunks so far, of all processes."""
        try:
            self.base = self.processes.share(self._make_plan)
            self.images.spread(self.processes)
            self.chunk = self._take_chunk()
        except BaseException:
            self.outputs.close()
            raise
        if self.processes.is_main:
            print_line(*self.plan.unread)

    def run(self) -> int:
        """Caption this process's share, wait for the others, write common files; return the exit code."""
        if self.chunk.tasks:
            self.outputs.begin(self.images)
        try:
            self._caption_chunks()
        finally:
            if self.bar:
                self.bar.close()
        if self.processes.is_main:
            self.summary.left = self.planner.count_left()
            self.summary.kept = self.planner.kept
            self.summary.unreadable = self.planner.missing + self.summary.unreadable
        total = sum(self.processes.gather(self.summary), CaptioningSummary())
        if self.processes.is_main:
            if not (self.chunk.is_last and self.given == len(self.chunk.tasks)):
                print_line(*self.plan.prompts.describe())
            done = not (total.unreadable or total.left)
            total.note_meanwhile(self.outputs.finish(self.images, done=done))
            print_line(*total.lines("caption" if self.options.prompts else "image"))
            if is_quiet():
                print_problem(*total.problems())
        # Only the main process returns 1: launchers end all processes as soon as one of them fails.
        return 1 if total.unreadable and self.processes.is_main else 0

    def keep_finished(self) -> None:
        """Write what was finished before an interrupt or error. Other processes may still be running."""
        with suppress(Exception):  # that of the writer, which has ended the run
            self._note_written(wait=True)
        if self.processes.is_main and self.summary.written:
            with suppress(CaptionTrainError):
                complete = self.processes.count == 1
                kept = self.outputs.finish(self.images, complete=complete, done=False)
                self.summary.note_meanwhile(kept)

    def say_interrupted(self) -> None:
        """Print what is done, and how to continue."""
        kept = "written; the same command goes on from there" if self.outputs.exist else "printed"
        if self.options.replaces and self.outputs.exist:
            how = "--overwrite" if self.options.overwrite else "--existing overwrite"
            kept = f"written; without {how} the same command captions those that have none yet"
        alone = self.processes.count == 1
        most = f"{self.given}" if self.chunk.is_last else f"up to {self._count_most():,}"
        count = f"{self.summary.written} of {most}" if alone else "finished"
        if self.processes.is_main:
            print_line(f"Interrupted: {count} captions are {kept}")
            print_line(*describe_meanwhile(self.summary.meanwhile))

    def _make_plan(self) -> Base:
        """Find images, model and prompts, and lock the outputs; in the main process."""
        options = self.options
        inputs = find_inputs(options.images, recursive=options.recursive, shard=Shard.parse(options.shard))
        self.images, self.plan = inputs.images, make_plan(options, self.family, inputs)
        self.outputs.open(self.images)
        batch_size = MOST_AT_ONCE if options.batch_size == "auto" else options.batch_size
        at_once = batch_size * self.processes.count
        size = max(CHUNK // at_once, 1) * at_once
        self.planner = Planner(self.images, self.outputs, self.plan, options.limit, size)
        return self.plan.base

    def _take_chunk(self) -> Chunk:
        chunk = self.processes.share(lambda: self.planner.next_chunk())
        self.given += len(chunk.tasks)
        return chunk

    def _count_most(self) -> int:
        """Return how many captions there may be in the end, of all processes."""
        before = self.given - len(self.chunk.tasks)
        return before + self.chunk.most * max(len(self.options.prompts), 1)

    def _caption_chunks(self) -> None:
        while True:
            if share := self.chunk.tasks[self.processes.rank :: self.processes.count]:
                self._caption(share)
            if not self.outputs.exist and self.processes.count > 1:
                lines = self.processes.gather(self.lines)
                self.lines = []
                if self.processes.is_main:
                    for _, line in sorted(line for part in lines for line in part):
                        print_result(line)
            if self.chunk.is_last:
                return
            self.chunk = self._take_chunk()

    def _caption(self, share: Sequence[Task]) -> None:
        count = self.processes.count
        self.engine = self.engine or self._open_engine()
        results = self.engine.caption(share)
        if self.bar is None:
            self.started = time.monotonic()
            self.bar = ProgressBar(0, "captioning", "image", shown=self.processes.is_main)
        most = self.given if self.chunk.is_last else self._count_most()
        self.bar.set_total(self.bar.done + len(share) if self.chunk.is_last else -(-most // count))
        with explaining_dead_worker(self.options.num_workers):
            for number, (task, result) in enumerate(zip(share, results, strict=True)):
                self._handle(task, result, number * count + self.processes.rank)
                # What is only printed is printed at once.
                self._note_written(wait=not self.outputs.exist)
            self._note_written(wait=True)

    def _open_engine(self) -> Engine:
        """Load what captions, with lines on it before and after."""
        engine = make_engine(self.family, self.base, self.options, self.processes)
        if self.processes.is_main:
            always = engine.always_says_prompt
            print_line(
                f"Captioning {self.chunk.describe()} of {len(self.images):,} images with "
                f"{engine.describe()}{self._describe_prompt(always=always)}"
            )
        lines = engine.open()
        if self.processes.is_main:
            prompts = self.plan.prompts.describe() if self.chunk.is_last else []
            print_line(*self.base.changes, *prompts, *lines)
        return engine

    def _handle(self, task: Task, result: CaptionResult | Unreadable, place: int) -> None:
        """Have the caption of one image written; `place` is its place among all of the chunk."""
        if isinstance(result, Unreadable):
            self.summary.unreadable.append(result.reason)
            self._advance(result.image)
            return
        generated = result.generated
        text = finish_caption(generated.text, self.options)
        answer = self.family.parse_answer(generated.text, task.prompt, result.size)
        self.writer.put(Caption(result.image, text, answer, find_remarks(generated)), task.key, place)

    def _count(self, written: Written) -> None:
        """Count a caption that is on the disk; in the writer's thread."""
        image = str(written.caption.image)
        if written.is_ours:
            self.summary.count(image, written.caption.remarks)
        else:
            self.summary.note_meanwhile([image], counted=False)

    def _note_written(self, *, wait: bool = False) -> None:
        """Show, or print, what is on the disk by now."""
        for written in self.writer.finished(wait=wait):
            caption, image = written.caption, escape_unprintable(written.caption.image)
            if written.is_ours:
                key = f"[{written.key}] " if written.key else ""
                line = f"{image}: {key}{escape_unprintable(caption.text)}"
            else:
                line = f"{image}: has a caption by now, which stays"
            self._advance(caption.image)
            if self.outputs.exist:
                continue
            if self.processes.count == 1:
                print_result(line)
            else:
                self.lines.append((written.place, line))

    def _advance(self, image: Path) -> None:
        self.summary.seconds = time.monotonic() - self.started
        self.bar.update(escape_unprintable(image.name)[:40])

    def _describe_prompt(self, *, always: bool = False) -> str:
        options = self.options
        if options.prompts:
            return f", {len(options.prompts)} prompts"
        kind = "prompt" if options.prompt_template is None else "prompt template"
        prompt = self.base.prompt if options.prompt_template is None else options.prompt_template
        return f', {kind} "{escape_unprintable(prompt)}"' if prompt or always else ""

"""Captions images with one or several processes, from the plan to the printed summary.

torch is imported only if there is an image to caption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from caption_train.captioning.cleaning import clean_caption
from caption_train.captioning.outputs import Caption, wrap_caption
from caption_train.captioning.plan import CaptionResult, Unreadable, make_plan, open_keyed_outputs
from caption_train.captioning.prompts import Task
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

if TYPE_CHECKING:
    import torch


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
        job.outputs.close()
        job.processes.leave()


class CaptionJob:
    """One process's share of captioning. The main process also makes the plan and prints the summary."""

    def __init__(self, options: CaptionOptions, family: Family) -> None:
        self.options = options
        self.family = family
        self.processes = join_processes()
        notice_launcher(self.processes.count)
        self.outputs = open_keyed_outputs(options, family, self.processes.rank)
        self.plan = self.processes.share(lambda: make_plan(options, family, self.outputs))
        self.lines: list[tuple[int, str]] = []
        self.summary = CaptioningSummary(adds=options.existing in ("append", "prepend"))
        if self.processes.is_main:
            self.summary.kept, self.summary.left = self.plan.kept, self.plan.left
            self.summary.unreadable += self.plan.missing
            print_line(*self.plan.unread)

    def run(self) -> int:
        """Caption this process's share, wait for the others, write common files; return the exit code."""
        share = self.plan.tasks[self.processes.rank :: self.processes.count]
        if self.plan.tasks:
            self.outputs.begin(self.plan.images)
        if share:
            self._caption(share)
        total = sum(self.processes.gather(self.summary), CaptioningSummary())
        lines = self.processes.gather(self.lines)
        if self.processes.is_main:
            done = not (total.unreadable or self.plan.left)
            total.note_meanwhile(self.outputs.finish(self.plan.images, done=done))
            for _, line in sorted(line for part in lines for line in part):
                print_result(line)
            print_line(*total.lines("caption" if self.options.prompts else "image"))
            if is_quiet():
                print_problem(*total.problems())
        # Only the main process returns 1: launchers end all processes as soon as one of them fails.
        return 1 if total.unreadable and self.processes.is_main else 0

    def keep_finished(self) -> None:
        """Write what was finished before an interrupt or error. Other processes may still be running."""
        if self.processes.is_main and self.summary.written:
            with suppress(CaptionTrainError):
                complete = self.processes.count == 1
                kept = self.outputs.finish(self.plan.images, complete=complete, done=False)
                self.summary.note_meanwhile(kept)

    def say_interrupted(self) -> None:
        """Print what is done, and how to continue."""
        kept = "written; the same command goes on from there" if self.outputs.exist else "printed"
        if self.options.replaces and self.outputs.exist:
            how = "--overwrite" if self.options.overwrite else "--existing overwrite"
            kept = f"written; without {how} the same command captions those that have none yet"
        alone = self.processes.count == 1
        count = f"{self.summary.written} of {len(self.plan.tasks)}" if alone else "finished"
        if self.processes.is_main:
            print_line(f"Interrupted: {count} captions are {kept}")
            print_line(*describe_meanwhile(self.summary.meanwhile))

    def _caption(self, share: Sequence[Task]) -> None:
        main = self.processes.is_main
        results = self._ask_endpoint(share) if self.options.endpoint else self._generate(share)
        start = time.monotonic()
        bar = ProgressBar(len(share), "captioning", "image", shown=main)
        with explaining_dead_worker(self.options.num_workers), bar:
            for number, (task, result) in enumerate(zip(share, results, strict=True)):
                line = self._handle(task, result)
                self.summary.seconds = time.monotonic() - start
                bar.update(escape_unprintable(result.image.name)[:40])
                if self.outputs.exist or isinstance(result, Unreadable):
                    continue
                if self.processes.count == 1:
                    print_result(line)
                else:
                    self.lines.append((number * self.processes.count + self.processes.rank, line))

    def _generate(self, share: Sequence[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Load the model and caption with it."""
        from caption_train.captioning.generate import (
            caption_images,
            find_dtype,
            load_captioner,
            make_generation,
        )
        from caption_train.captioning.graphs import DecodeGraphs
        from caption_train.system.devices import choose_device

        main = self.processes.is_main
        device = choose_device(
            self.options.device, local_rank=self.processes.local_rank, processes=self.processes.count
        )
        if self.options.cuda_graphs and device.type != "cuda":
            raise UsageError(f"--cuda_graphs: needs an NVIDIA GPU, and this runs on {device}: leave it out")
        if main:
            print_line(self._describe(device, find_dtype(self.options, device)))
        model, processor = load_captioner(self.family, self.plan.base, self.options, device)
        if main:
            print_line(*self.plan.base.changes, *self.plan.lines, *self.family.describe_inputs(processor))
        return caption_images(
            self.family,
            model,
            processor,
            [task.image for task in share],
            make_generation(self.options, self.plan.base.prompt),
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            worker_timeout=self.options.worker_timeout,
            prompts=[task.prompt for task in share],
            graphs=DecodeGraphs(model) if self.options.cuda_graphs else None,
        )

    def _ask_endpoint(self, share: Sequence[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Have a server caption."""
        from caption_train.captioning.endpoint import Endpoint, caption_by_endpoint

        endpoint = Endpoint.from_options(self.options)
        if self.processes.is_main:
            print_line(
                f"Captioning {len(self.plan.pending):,} of {len(self.plan.images):,} images with "
                f"{endpoint.model} at {endpoint.url}{self._describe_prompt(always=True)}",
                *self.plan.base.changes,
                *self.plan.lines,
            )
        return caption_by_endpoint(endpoint, self.family, share, self.plan.base)

    def _handle(self, task: Task, result: CaptionResult | Unreadable) -> str:
        """Write and count the result of one image; return it as a line."""
        if isinstance(result, Unreadable):
            self.summary.unreadable.append(result.reason)
            return result.reason
        options, generated = self.options, result.generated
        text = wrap_caption(
            clean_caption(generated.text, options.clean),
            prefix=options.prefix,
            suffix=options.suffix,
            trigger=options.trigger,
        )
        answer = self.family.parse_answer(generated.text, task.prompt, result.size)
        remarks = find_remarks(generated)
        if not self.outputs.write(Caption(result.image, text, answer, remarks), task.key):
            self.summary.meanwhile.append(escape_unprintable(result.image))
            return f"{escape_unprintable(result.image)}: has a caption by now, which stays"
        self.summary.count(str(result.image), remarks)
        key = f"[{task.key}] " if task.key else ""
        return f"{escape_unprintable(result.image)}: {key}{escape_unprintable(text)}"

    def _describe(self, device: torch.device, dtype: torch.dtype) -> str:
        adapter = f" and {self.options.peft_model}" if self.options.peft_model else ""
        quantized = f", the base in {self.options.quantize}" if self.options.quantize else ""
        precision = str(dtype).removeprefix("torch.") + quantized
        return (
            f"Captioning {len(self.plan.pending):,} of {len(self.plan.images):,} images with "
            f"{self.plan.base.model_id}{adapter} on {device} in {precision}{self._describe_prompt()}"
        )

    def _describe_prompt(self, *, always: bool = False) -> str:
        options = self.options
        if options.prompts:
            return f", {len(options.prompts)} prompts"
        kind = "prompt" if options.prompt_template is None else "prompt template"
        prompt = self.plan.base.prompt if options.prompt_template is None else options.prompt_template
        return f', {kind} "{escape_unprintable(prompt)}"' if prompt or always else ""

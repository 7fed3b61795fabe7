"""A folder of images → captions: what is left to do, the model and its adapter, the work, the summary.

It knows no family and needs torch only when there is an image to caption.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.captions import printable
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.inputs import find_inputs
from caption_train.options import CaptionOptions
from caption_train.outputs import Outputs, wrap_caption
from caption_train.processes import Processes, join_processes
from caption_train.tally import Tally, find_remarks

if TYPE_CHECKING:
    from caption_train.generating import Captioned, Generation


@dataclass(frozen=True)
class Plan:
    """images: all that were asked for, in order. pending: those to caption now. model_id, …: with what."""

    images: Sequence[Path]
    pending: Sequence[Path]
    missing: Sequence[str]
    model_id: str
    revision: str | None
    prompt: str


def caption_folder(options: CaptionOptions, family: Family) -> int:
    """Caption what `options.images` names and print a summary; return the exit code.

    1: an image could not be read; all others are captioned. 130 or 143: Ctrl-C or SIGTERM; what was finished
    is written, and the same command goes on from there. Raises UsageError before anything is loaded, and
    CaptionTrainError.
    """
    processes = join_processes()
    outputs = Outputs(options, processes.rank)
    plan = processes.share(partial(make_plan, options, family, outputs))
    tally = Tally(kept=len(plan.images) - len(plan.pending), unreadable=list(plan.missing))
    if not processes.is_main:
        tally = Tally()
    lines: list[tuple[int, str]] = []
    try:
        with _terminable():
            _caption_share(options, family, plan, outputs, processes, tally, lines)
            tallies = processes.gather(tally)
            lines = sorted(line for share in processes.gather(lines) for line in share)
    except BaseException as error:
        return _stop(error, plan, outputs, tally, processes)
    total = sum(tallies, Tally())
    if processes.is_main:
        outputs.finish(plan.images)
        for _, line in lines:
            print(line)
        print("\n".join(total.lines()), file=sys.stderr)
    return 1 if total.unreadable else 0


def make_plan(options: CaptionOptions, family: Family, outputs: Outputs) -> Plan:
    """Decide what is captioned with what, from the options and the adapter's account of itself."""
    inputs = find_inputs(options.images, recursive=options.recursive)
    if options.visualize and not hasattr(family, "draw_answer"):
        raise UsageError(f"--visualize: {family.title} gives no boxes to draw")
    model_id, revision = options.base_model or family.model_id, options.revision
    prompt = options.prompt if options.task is None else options.task
    if options.peft_model:
        from caption_train.lora import check_base, read_adapter

        adapter = read_adapter(options.peft_model)
        model_id = options.base_model or adapter.base_model or model_id
        check_base(adapter, family.name, model_id, family.base_models)
        prompt = adapter.prompt if prompt is None else prompt
        if model_id == adapter.base_model:
            revision = revision or adapter.revision
    if model_id == family.model_id:
        revision = revision or family.revision
    prompt = family.default_prompt if prompt is None else prompt
    pending = outputs.find_pending(inputs.images)
    return Plan(inputs.images, pending, inputs.missing, model_id, revision, prompt)


def _caption_share(
    options: CaptionOptions,
    family: Family,
    plan: Plan,
    outputs: Outputs,
    processes: Processes,
    tally: Tally,
    lines: list[tuple[int, str]],
) -> None:
    """Caption this process's share of the pending images, writing each result at once."""
    share = plan.pending[processes.rank :: processes.count]
    if not share:
        return
    from tqdm import tqdm

    from caption_train.generating import Captioned, caption_images, choose_device

    device = choose_device(options.device, local_rank=processes.local_rank, processes=processes.count)
    if processes.is_main:
        print(_describe(options, plan, device), file=sys.stderr)
    model, processor = _load(options, family, plan, device)
    results = caption_images(
        family,
        model,
        processor,
        share,
        make_generation(options, plan.prompt),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    start = time.monotonic()
    bar = tqdm(total=len(share), unit="image", disable=None if processes.is_main else True)
    for number, result in enumerate(results):
        if isinstance(result, Captioned):
            text = _write(options, family, plan, outputs, result, tally)
            bar.set_postfix_str(printable(text)[:60], refresh=False)
            if not outputs.exist:
                line = f"{printable(result.image)}: {printable(text)}"
                if processes.count == 1:
                    bar.write(line, file=sys.stdout)
                else:
                    lines.append((number * processes.count + processes.rank, line))
        else:
            tally.unreadable.append(result.reason)
        tally.seconds = time.monotonic() - start
        bar.update()
    bar.close()


def make_generation(options: CaptionOptions, prompt: str) -> Generation:
    """Return how captions are generated. Without a temperature a caption is a function of its image."""
    from caption_train.generating import Generation

    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": options.max_token_length}
    if options.beams:
        settings["num_beams"] = options.beams
    if not options.temperature:
        return Generation(prompt, settings)
    from caption_train.sampling import make_sampler

    sampler = partial(make_sampler, temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    return Generation(prompt, settings | {"num_beams": 1}, sampler)


def _load(options: CaptionOptions, family: Family, plan: Plan, device: Any) -> tuple[Any, Any]:
    import torch

    from caption_train.generating import out_of_memory_explained

    dtype = getattr(torch, options.dtype)
    with out_of_memory_explained(device, options.batch_size):
        model, processor = family.load(plan.model_id, revision=plan.revision, dtype=dtype)
        if options.peft_model:
            from caption_train.lora import load_adapter

            model = load_adapter(model, options.peft_model)
        return model.to(device, dtype).eval(), processor


def _write(
    options: CaptionOptions, family: Family, plan: Plan, outputs: Outputs, result: Captioned, tally: Tally
) -> str:
    """Write one caption everywhere it goes, count it and return it."""
    generated = result.generated
    text = wrap_caption(generated.text, prefix=options.prefix, suffix=options.suffix, trigger=options.trigger)
    parse = getattr(family, "parse_answer", None)
    answer = parse(generated.text, plan.prompt, result.size) if parse else None
    remarks = find_remarks(generated)
    outputs.write(result.image, text, answer=answer, remarks=remarks)
    tally.count(str(result.image), remarks)
    return text


def _describe(options: CaptionOptions, plan: Plan, device: Any) -> str:
    adapter = f" and {options.peft_model}" if options.peft_model else ""
    prompt = f', prompt "{printable(plan.prompt)}"' if plan.prompt else ""
    return (
        f"Captioning {len(plan.pending):,} of {len(plan.images):,} images with {plan.model_id}{adapter} "
        f"on {device} in {options.dtype}{prompt}"
    )


def _stop(error: BaseException, plan: Plan, outputs: Outputs, tally: Tally, processes: Processes) -> int:
    """Write what was finished; say so after an interrupt, raise again what is an error."""
    alone = processes.count == 1
    if processes.is_main:
        with suppress(CaptionTrainError):
            outputs.finish(plan.images, complete=alone)
    if not isinstance(error, KeyboardInterrupt):
        raise error
    if processes.is_main:
        count = f"{tally.written} of {len(plan.pending)} captions are" if alone else "finished captions are"
        kept = "written; the same command goes on from there" if outputs.exist else "printed"
        print(f"Interrupted: {count} {kept}", file=sys.stderr)
    return 143 if isinstance(error, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the work as Ctrl-C does."""

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

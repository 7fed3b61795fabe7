"""Captions images with one candidate, and keeps every caption in a journal, so that nothing is made twice."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.adapters.record import read_adapter
from caption_train.config.captioning import CaptionOptions
from caption_train.config.evaluation import EvaluateOptions
from caption_train.config.values import parse_bytes
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.evaluation.candidates import Candidate
from caption_train.evaluation.questions import Question
from caption_train.families.base import Family
from caption_train.metrics.output_health import REMARKS, find_remarks
from caption_train.system.console import ProgressBar, escape_unprintable, print_line
from caption_train.system.files import AppendedRows, parse_rows, read_regular_file
from caption_train.system.workers import explaining_dead_worker

if TYPE_CHECKING:
    from caption_train.features.source import Keeping

JOURNAL = "captions.jsonl"
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Made:
    """A caption that a model made. remarks: keys of REMARKS."""

    text: str
    remarks: tuple[str, ...] = ()


class Journal:
    """The captions in an output folder: a line each, under a hash of image, model, prompt and settings.

    A line is written as soon as its caption is there, so that a kill costs one batch at most. A file of this
    name that somebody else wrote is refused, so that nothing is added to it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self._made = self._read()
        self._file = AppendedRows(self.path)

    def get(self, key: str) -> Made | None:
        """Return the caption under a key, if it was made."""
        return self._made.get(key)

    def add(self, key: str, made: Made, **about: Any) -> None:
        """Keep a caption; `about` is for people who read the file.

        Raises:
            CaptionTrainError: it cannot be written.
        """
        self._made[key] = made
        try:
            self._file.append({"key": key, "text": made.text, "remarks": list(made.remarks), **about})
        except OSError as error:
            raise CaptionTrainError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> dict[str, Made]:
        try:
            content = read_regular_file(self.path, _MOST_BYTES, is_own=True)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CaptionTrainError(f"{self.path}: {reason}, where finished captions would be") from error
        made = {}
        for row in parse_rows(content.split(b"\n")):
            match row:
                case {"key": str(key), "text": str(text), "remarks": list(remarks)}:
                    made[key] = Made(text, tuple(remark for remark in REMARKS if remark in remarks))
                case _:
                    raise UsageError(
                        f"--output_dir {self.path.parent}: its {JOURNAL} is not one that evaluating wrote; "
                        "choose another folder"
                    )
        return made


def caption_questions(
    candidate: Candidate,
    questions: Sequence[Question],
    options: EvaluateOptions,
    family: Family,
    journal: Journal,
) -> tuple[list[Made | None], list[str]]:
    """Caption images with one candidate. The model is loaded only if captions are missing in the journal.

    Args:
        candidate: the model.
        questions: the images.
        options: how captions are made.
        family: the models' family.
        journal: the captions that are there, and where new ones go.

    Returns:
        A caption for each question, None where the image cannot be read; and a line for each such image.
    """
    prompts = [candidate.base.prompt if q.prompt is None else q.prompt for q in questions]
    settings = _describe_settings(candidate, options)
    keys = [
        hashlib.sha256(json.dumps([q.digest, candidate.identity, prompt, settings]).encode()).hexdigest()
        for q, prompt in zip(questions, prompts, strict=True)
    ]
    pending = [index for index, key in enumerate(keys) if journal.get(key) is None]
    unreadable: list[str] = []
    if pending:
        groups: dict[str, list[int]] = {}
        for index in pending:
            groups.setdefault(prompts[index], []).append(index)
        kept = len(questions) - len(pending)
        name = escape_unprintable(candidate.name)
        print_line(
            f"Captioning {len(pending):,} of {len(questions):,} images with {name}"
            + (f"; {kept:,} captions are there already" if kept else "")
        )
        with (
            explaining_dead_worker(options.num_workers),
            ProgressBar(len(pending), "captioning", "image") as bar,
        ):
            for index, result in _generate(candidate, groups, questions, options, family):
                bar.update(escape_unprintable(questions[index].name)[:40])
                if isinstance(result, str):
                    unreadable.append(result)
                else:
                    about = {"image": questions[index].name, "model": candidate.name}
                    journal.add(keys[index], result, **about)
    return [journal.get(key) for key in keys], unreadable


def _describe_settings(candidate: Candidate, options: EvaluateOptions) -> dict[str, Any]:
    dtype, trained = _find_precision(options)
    settings = {"dtype": f"auto {trained}" if dtype == "auto" else dtype}
    settings |= {name: getattr(options, name) for name in ("quantize", "beams", "max_token_length")}
    return settings | {name: candidate.base.settings[name] for name in sorted(candidate.base.settings)}


def _find_precision(options: EvaluateOptions) -> tuple[str, str | None]:
    """Return `--dtype`, and the mixed precision of the first adapter's training, which "auto" depends on.

    All models run in the same precision, so that the adapter alone makes the difference.
    """
    if options.dtype != "auto" and (not options.quantize or "dtype" in options.sources):
        return options.dtype, None
    return "auto", read_adapter(options.peft_model[0]).mixed_precision if options.peft_model else None


def _generate(
    candidate: Candidate,
    groups: Mapping[str, Sequence[int]],
    questions: Sequence[Question],
    options: EvaluateOptions,
    family: Family,
) -> Iterator[tuple[int, Made | str]]:
    """Yield (number of the question, caption or why there is none), a model in memory meanwhile."""
    import torch

    from caption_train.captioning.generate import caption_images, load_captioner, make_generation
    from caption_train.captioning.plan import Unreadable
    from caption_train.system.devices import choose_device, choose_dtype

    device = choose_device(options.device)
    dtype = str(choose_dtype(*_find_precision(options), device)).removeprefix("torch.")
    given = _make_caption_options(options, candidate, dtype)
    model, processor = load_captioner(family, candidate.base, given, device)
    family.check_inputs(processor, list(groups))
    keeping = None
    if options.cache_features:
        asked = [questions[index] for group in groups.values() for index in group]
        keeping = _start_keeping(model, family, processor, asked, next(iter(groups)), options)
    print_line(*candidate.base.changes)
    for prompt, indices in groups.items():
        results = caption_images(
            family,
            model,
            processor,
            [questions[index].image for index in indices],
            make_generation(given, prompt),
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            worker_timeout=options.worker_timeout,
            keeping=keeping,
        )
        for index, result in zip(indices, results, strict=True):
            if isinstance(result, Unreadable):
                yield index, result.reason
            else:
                yield index, Made(result.generated.text, tuple(find_remarks(result.generated)))
    # The next candidate is loaded when this one is gone.
    del model, processor, keeping
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _start_keeping(
    model: Any,
    family: Family,
    processor: Any,
    asked: Sequence[Question],
    prompt: str,
    options: EvaluateOptions,
) -> Keeping:
    from caption_train.features.opening import Opening

    if not family.keeps_features:
        raise UsageError(f"--cache_features: {family.title} keeps no features: drop it")
    digests = {question.image: question.digest for question in asked}
    # Not shared with training, whose attention rounds otherwise: see `Family.speed_up`.
    limit = options.cache_limit and parse_bytes(options.cache_limit)
    opening = Opening(model, family, processor, digests, prompt, precision="captioning", limit=limit)
    opening.prepare()
    keeping, line = opening.start(report=print_line)
    print_line(line)
    return keeping


def _make_caption_options(options: EvaluateOptions, candidate: Candidate, dtype: str) -> CaptionOptions:
    """Return the options with which captioning makes this candidate's captions."""
    shared = ("device", "quantize", "beams", "max_token_length", "batch_size", "num_workers")
    return CaptionOptions(
        images=["-"],
        base_model=candidate.base.model_id,
        peft_model=candidate.adapter,
        worker_timeout=options.worker_timeout,
        dtype=dtype,
        sources={**options.sources, "dtype": "evaluation"},
        **{name: getattr(options, name) for name in shared},
    )

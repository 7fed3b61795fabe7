"""Keeps a run's report.html up to date: curves, and what the model says of validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caption_train.data.images import ImageError, open_image
from caption_train.families.base import Generated
from caption_train.metrics.coco import cider_each, rouge_l_each
from caption_train.metrics.output_health import REMARKS, find_remarks
from caption_train.metrics.ptb_tokenizer import tokenize
from caption_train.reporting.curves import read_charts, read_log
from caption_train.reporting.page import read_gallery, write_report
from caption_train.reporting.report import REPORT_FILE, Answer, Cell, Item, Report, Row, Thumbnail, name_model
from caption_train.reporting.thumbnails import make_thumbnails
from caption_train.system.console import escape_unprintable, print_line
from caption_train.training.monitor.log import Sample
from caption_train.training.run.run import TrainingRun

MOST_IMAGES, MOST_COLUMNS = 200, 8
BEFORE = "before training"
LABELS = {"loss": "loss per token", "cider": "CIDEr", "bleu": "BLEU-4", "rouge_l": "ROUGE-L"}

Key = tuple[Path, str]
"""An image and the prompt that is asked about it."""


@dataclass
class Column:
    """What validation and previews found at one step. answers: by place in the gallery."""

    values: dict[str, float] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)


class RunReport:
    """Writes the report of a run that has validation images, anew at each validation.

    It shows captions that --metrics and previews have made anyway. That it cannot be written is said once,
    and never ends a run.

    Args:
        run: the run; only its main process writes.
        shown: image and prompt, with the references, of what --metrics may caption.
        is_wanted: whether the run has validation images.
    """

    def __init__(
        self, run: TrainingRun, shown: Sequence[tuple[Key, Sequence[str]]], *, is_wanted: bool
    ) -> None:
        self.run, self.shown = run, shown[:MOST_IMAGES]
        self.path = run.options.output_dir / REPORT_FILE
        self.is_wanted = is_wanted and run.accelerator.is_main_process
        self.is_written = False
        self._places = {key: place for place, (key, _) in enumerate(self.shown)}
        self._tokens = [[tokenize(reference) for reference in references] for _, references in self.shown]
        self._columns: dict[int, Column] = {}
        self._thumbnails: list[Thumbnail | None] | None = None

    def update(
        self, step: int, captions: Mapping[Key, str], values: Mapping[str, float] | None = None
    ) -> None:
        """Add what was found at a step, and write the page.

        Args:
            step: the optimizer step, 0 before training.
            captions: what the model says.
            values: the results of the validation, if this is one.
        """
        if not self.is_wanted:
            return
        # A report is no reason to lose a run, whatever is wrong with it.
        try:
            if not self._columns and self.run.plan.first_step:
                self._columns = self._restore()
            column = self._columns.setdefault(step, Column())
            column.values |= values or {}
            column.answers |= self._judge(captions)
            self._columns = _thin(self._columns)
            write_report(self.path, self._make())
            self.is_written = True
        except Exception as error:
            self.is_wanted = False
            reason = (isinstance(error, OSError) and error.strerror) or error or type(error).__name__
            print_line(f"{self.path} is not written: {reason}")

    def find_captions(self, step: int) -> dict[Key, str]:
        """Return what the model said at a step that the report shows; after a resume, of before it too."""
        column = self._columns.get(step, Column())
        return {self.shown[place][0]: answer.text for place, answer in column.answers.items()}

    def find_samples(self, count: int) -> tuple[list[Sample], list[Sample]]:
        """Return the first images, with their captions before training and now, for the model card."""
        steps = sorted(self._columns)
        chosen = [
            place for place in range(len(self.shown)) if steps and place in self._columns[steps[-1]].answers
        ]
        first, latest = [], []
        for place in chosen[:count]:
            (image, _), references = self.shown[place]
            try:
                opened = open_image(image)
            except ImageError:
                continue
            latest.append(
                Sample(image.name, opened, references[0], self._columns[steps[-1]].answers[place].text)
            )
            if 0 in self._columns and place in self._columns[0].answers:
                first.append(Sample(image.name, opened, references[0], self._columns[0].answers[place].text))
        return first, latest

    def _judge(self, captions: Mapping[Key, str]) -> dict[int, Answer]:
        found = {self._places[key]: text for key, text in captions.items() if key in self._places}
        if not found:
            return {}
        # CIDEr weighs words by the references of all images, captioned now or not.
        tokens = [tokenize(found.get(place, "")) for place in range(len(self.shown))]
        cider, rouge_l = cider_each(tokens, self._tokens), rouge_l_each(tokens, self._tokens)
        return {
            place: Answer(
                text, find_remarks(Generated(text)), {"cider": cider[place], "rouge_l": rouge_l[place]}
            )
            for place, text in found.items()
        }

    def _make(self) -> Report:
        options, steps = self.run.options, sorted(self._columns)
        names = [_name(step) for step in steps]
        folder = options.output_dir.resolve().name
        facts = [
            ("Base", name_model(self.run.record.base_model)),
            ("Prompt", self.run.record.prompt or "none"),
        ]
        facts += [("Step", f"{steps[-1]:,} of {self.run.plan.total_steps:,}")]
        notes = ()
        if any(name in column.values for column in self._columns.values() for name in options.metrics):
            notes = (f"Metrics are of {len(self.shown)} validation images, the loss is of all of them.",)
        return Report(
            f"Training of {options.name or folder}",
            facts,
            names,
            self._make_rows(steps),
            self._make_items(steps),
            [(folder, charts)] if (charts := read_charts(options.output_dir)) else [],
            notes,
        )

    def _make_rows(self, steps: Sequence[int]) -> list[Row]:
        keys = list(dict.fromkeys(name for step in steps for name in self._columns[step].values))
        rows = [
            Row(
                key,
                LABELS.get(key, key.replace("_", " ")),
                [Cell(_finite(self._columns[step].values.get(key))) for step in steps],
                -1 if key == "loss" else 1,
                key == "exact_match",
            )
            for key in keys
        ]
        # What single captions are ordered by, in the table or not.
        more = [key for key in ("cider", "rouge_l") if key not in keys]
        return rows + [Row(key, LABELS[key], (), 1) for key in more]

    def _make_items(self, steps: Sequence[int]) -> list[Item]:
        places = sorted({place for column in self._columns.values() for place in column.answers})
        if places and self._thumbnails is None:
            self._thumbnails = make_thumbnails([image for (image, _), _ in self.shown])
        return [
            Item(
                self._name_of(place),
                self.shown[place][1],
                [self._columns[step].answers.get(place) for step in steps],
                self._thumbnails[place],
            )
            for place in places
        ]

    def _name_of(self, place: int) -> str:
        (image, _), _ = self.shown[place]
        root = self.run.options.dataset_dir
        inside = image.is_relative_to(root)
        return escape_unprintable(image.relative_to(root) if inside else f"{image.parent.name}/{image.name}")

    def _restore(self) -> dict[int, Column]:
        """Return what the page of this run showed before it was stopped, up to the step it goes on from."""
        page = read_gallery(self.path)
        steps = {_name(step): step for step in range(self.run.plan.first_step + 1)}
        columns = {place: Column() for place, name in enumerate(_list(page.get("columns"))) if name in steps}
        by_name = {
            (self._name_of(place), tuple(self.shown[place][1])): place for place in range(len(self.shown))
        }
        for item in filter(lambda item: isinstance(item, dict), _list(page.get("items"))):
            key = (str(item.get("name")), tuple(map(str, _list(item.get("references")))))
            for number, answer in enumerate(_list(item.get("answers"))):
                if key in by_name and number in columns and (read := _read_answer(answer)):
                    columns[number].answers[by_name[key]] = read
        found = {steps[page["columns"][place]]: column for place, column in columns.items()}
        for line in read_log(self.run.options.output_dir):
            if line.get("step") in found:
                values = {
                    name.removeprefix("eval_"): x for name, x in line.items() if name.startswith("eval_")
                }
                found[line["step"]].values |= values
        return found


def _read_answer(value: Any) -> Answer | None:
    match value:
        case [str(text), list(remarks), dict(scores)]:
            numbers = {name: float(x) for name, x in scores.items() if isinstance(x, int | float)}
            return Answer(text, [remark for remark in REMARKS if remark in remarks], numbers)
    return None


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _name(step: int) -> str:
    return f"step {step}" if step else BEFORE


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def _thin(columns: dict[int, Column]) -> dict[int, Column]:
    """Return at most MOST_COLUMNS columns: the first, the last, and others as evenly spread as can be."""
    while len(columns) > MOST_COLUMNS:
        steps = sorted(columns)
        # The one whose neighbours are closest to each other is missed least.
        gaps = {steps[i]: steps[i + 1] - steps[i - 1] for i in range(1, len(steps) - 1)}
        columns = {step: columns[step] for step in steps if step != min(gaps, key=gaps.__getitem__)}
    return columns

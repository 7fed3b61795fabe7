"""Writes evaluation.json, evaluation.md and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.config.evaluation import HIGHER, LOWER, EvaluateOptions
from caption_train.evaluation.candidates import Candidate
from caption_train.evaluation.captions import Made
from caption_train.evaluation.questions import EvaluationSet, Question
from caption_train.evaluation.scores import LABELS, SHARES, Score, Scores
from caption_train.reporting.curves import LOG_FILE, read_charts
from caption_train.reporting.markdown import escape_cell
from caption_train.reporting.page import describe_change, format_number, judge, write_report
from caption_train.reporting.report import REPORT_FILE, Answer, Cell, Item, Report, Row, name_model
from caption_train.reporting.thumbnails import make_thumbnails
from caption_train.system.files import write_atomically

JSON_FILE, MARKDOWN_FILE = "evaluation.json", "evaluation.md"
MOST_ROWS = 50
NOTES = (
    "Below a score is its 95 % interval, from resampling the images. Below that is the difference from the "
    "base, with its interval on the same images, and p: how often swapping the two models' captions at "
    'random gives as large a difference. "Better" and "worse" stand where p is below 0.05; of twenty '
    "comparisons without any difference, one is by chance.",
)


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        options: what was asked for.
        data: the images that were asked for, and which could not be read.
        questions: those of them that every model has captioned.
        candidates: the models, the base first.
        captions: a list for each model, of a caption for each question.
        scores: of each model.
        unreadable: a line for each image that could not be read.
    """

    options: EvaluateOptions
    data: EvaluationSet
    questions: Sequence[Question]
    candidates: Sequence[Candidate]
    captions: Sequence[Sequence[Made]]
    scores: Sequence[Scores]
    unreadable: Sequence[str]


def write_results(results: Results) -> None:
    """Write the three files to the output folder, each whole or not at all."""
    folder = results.options.output_dir
    report = make_report(results)
    write_atomically(folder / JSON_FILE, json.dumps(describe_results(results), indent=2) + "\n")
    write_atomically(folder / MARKDOWN_FILE, describe_in_markdown(results, report))
    write_report(folder / REPORT_FILE, report)


def describe_results(results: Results) -> dict[str, Any]:
    """Return the content of evaluation.json."""
    names = [candidate.name for candidate in results.candidates]
    return {
        "dataset_dir": str(results.options.dataset_dir),
        "split": results.data.split,
        "images": len(results.questions),
        "unreadable": list(results.unreadable),
        "settings": {
            name: getattr(results.options, name)
            for name in ("dtype", "quantize", "beams", "max_token_length", "resamples", "seed")
        },
        "models": [
            {
                "name": candidate.name,
                "peft_model": str(candidate.adapter) if candidate.adapter else None,
                "base_model": candidate.base.model_id,
                "revision": candidate.base.revision,
                "prompt": candidate.base.prompt,
                "identity": candidate.identity,
                "metrics": {name: _describe_score(score) for name, score in scores.of_all.items()},
            }
            for candidate, scores in zip(results.candidates, results.scores, strict=True)
        ],
        "captions": [
            {
                "file": question.name,
                "sha256": question.digest,
                **({"prompt": question.prompt} if question.prompt is not None else {}),
                "references": list(question.references),
                "models": {
                    name: {
                        "text": made[index].text,
                        "remarks": list(made[index].remarks),
                        **{metric: float(each[index]) for metric, each in scores.of_each.items()},
                    }
                    for name, made, scores in zip(names, results.captions, results.scores, strict=True)
                },
            }
            for index, question in enumerate(results.questions)
        ],
    }


def _describe_score(score: Score) -> dict[str, float]:
    found = {"value": score.value}
    if score.interval:
        found |= {"low": score.interval[0], "high": score.interval[1]}
    if score.change:
        change = score.change
        found |= {"over_base": change.value, "over_base_low": change.low, "over_base_high": change.high}
        found["p"] = change.p
    return found


def make_report(results: Results) -> Report:
    """Return the page of an evaluation."""
    names = [candidate.name for candidate in results.candidates]
    pictures = (
        [None] * len(results.questions)
        if results.options.no_pictures
        else make_thumbnails([question.image for question in results.questions], show_progress=True)
    )
    items = [
        Item(
            question.name,
            question.references,
            [
                _answer(made[index], scores, index)
                for made, scores in zip(results.captions, results.scores, strict=True)
            ],
            picture,
            question.prompt or "",
        )
        for index, (question, picture) in enumerate(zip(results.questions, pictures, strict=True))
    ]
    first = results.candidates[0].base
    facts = [
        ("Dataset", results.options.dataset_dir.resolve().name),
        ("Images", f"{len(items)}: {results.data.split}"),
    ]
    facts += [("Base", name_model(first.model_id)), ("Prompt", first.prompt or "none")]
    others = [c for c in results.candidates[1:] if c.base.prompt != first.prompt]
    facts += [(f"Prompt of {c.name}", c.base.prompt or "none") for c in others]
    charts = [(c.name, found) for c in results.candidates if c.adapter and (found := _find_charts(c.adapter))]
    notes = NOTES if len(names) > 1 else (NOTES[0].partition(" Below that")[0],)
    if not results.data.has_references:
        notes += ("The dataset has no captions, so nothing says which captions are right.",)
    return Report(
        f"{' and '.join(names[1:]) or name_model(first.model_id)} on {facts[0][1]}",
        facts,
        names,
        _make_rows(results),
        items,
        charts,
        notes,
    )


def _answer(made: Made, scores: Scores, index: int) -> Answer:
    return Answer(
        made.text, made.remarks, {name: float(each[index]) for name, each in scores.of_each.items()}
    )


def _make_rows(results: Results) -> list[Row]:
    rows = []
    for name in results.scores[0].of_all:
        cells = []
        for score in (scores.of_all[name] for scores in results.scores):
            change = score.change and (
                score.change.value,
                score.change.low,
                score.change.high,
                score.change.p,
            )
            cells.append(Cell(score.value, score.interval, change))
        better = 1 if name in HIGHER else -1 if name in LOWER else 0
        rows.append(Row(name, LABELS[name], cells, better, name in SHARES))
    return rows


def _find_charts(adapter: Path) -> list:
    """Return the charts of an adapter's run, whose log is in its folder, or one above for a checkpoint."""
    folder = adapter if (adapter / LOG_FILE).is_file() else adapter.resolve().parent
    return read_charts(folder)


def describe_in_markdown(results: Results, report: Report) -> str:
    """Return the content of evaluation.md: the summary, and the first captions side by side."""
    lines = [f"# {escape_cell(report.title)}", ""]
    lines += [f"- {escape_cell(what)}: {escape_cell(value)}" for what, value in report.facts]
    lines += [
        "",
        f"| metric | {' | '.join(map(escape_cell, report.columns))} |",
        "|---" * (len(report.columns) + 1) + "|",
    ]
    for row in report.rows:
        cells = []
        for cell in row.cells:
            shown = format_number(cell.value, row)
            if cell.interval:
                shown += f" [{format_number(cell.interval[0], row)}, {format_number(cell.interval[1], row)}]"
            if cell.change:
                shown += f"; {describe_change(cell, row)} {judge(cell, row)}".rstrip()
            cells.append(shown)
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    lines += ["", *(line for note in report.notes for line in (note, ""))]
    shown = results.questions[:MOST_ROWS]
    more = f" (the first {MOST_ROWS}; all are in {REPORT_FILE})" if len(results.questions) > MOST_ROWS else ""
    lines += [f"## Captions{more}", ""]
    has_references = results.data.has_references
    columns = ["image", *(["reference"] if has_references else []), *report.columns]
    lines += [f"| {' | '.join(map(escape_cell, columns))} |", "|---" * len(columns) + "|"]
    for index, question in enumerate(shown):
        cells = [question.name, *([" / ".join(question.references)] if has_references else [])]
        cells += [made[index].text for made in results.captions]
        lines.append(f"| {' | '.join(map(escape_cell, cells))} |")
    return "\n".join([*lines, ""]).encode("utf-8", "backslashreplace").decode()

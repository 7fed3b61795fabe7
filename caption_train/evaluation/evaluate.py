"""Evaluates a base and its adapters on a dataset: from the plan to the files and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caption_train.config.evaluation import LOWER, EvaluateOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.evaluation.candidates import Candidate, find_candidates, find_family
from caption_train.evaluation.captions import Journal, Made, caption_questions
from caption_train.evaluation.questions import EvaluationSet, Question, read_questions
from caption_train.families.base import Family
from caption_train.metrics.tags import are_tags
from caption_train.reporting.report import REPORT_FILE
from caption_train.system.console import count_things, is_quiet, print_line, print_problem, print_result
from caption_train.system.files import clear_temporary
from caption_train.system.lock import OutputLock
from caption_train.system.processes import refuse_several_processes
from caption_train.system.signals import Terminated, raising_terminated

if TYPE_CHECKING:
    from caption_train.evaluation.results import Results

NEED_REFERENCES = ("cider", "bleu", "rouge_l", "exact_match", "tag_precision", "tag_recall", "tag_f1")


def evaluate(options: EvaluateOptions) -> int:
    """Caption a dataset with each model, score the captions, and write the results.

    Returns:
        The exit code. 0: all is well. 1: an image could not be read. 130 or 143: Ctrl-C or SIGTERM; the same
        command goes on from the captions that are there.

    Raises:
        UsageError: the options cannot work; raised before a model is loaded.
        CaptionTrainError: a model cannot be loaded, or `--fail_on_regression` finds an adapter worse.
    """
    refuse_several_processes("evaluate")
    try:
        with raising_terminated():
            results = evaluate_models(options)
    except KeyboardInterrupt as interrupt:
        print_line("Interrupted: finished captions are kept; the same command goes on from there")
        return 143 if isinstance(interrupt, Terminated) else 130
    print_results(results)
    raise_regressions(results)
    return 1 if results.unreadable else 0


def evaluate_models(options: EvaluateOptions) -> Results:
    """Caption a dataset with each model, score the captions, and write the results.

    Raises:
        UsageError: the options cannot work; raised before a model is loaded.
        CaptionTrainError: a model cannot be loaded, or no image can be read.
    """
    family = find_family(options)
    candidates = find_candidates(options, family)
    data = read_questions(options)
    tags = _use_tags(options, data)
    _check_regression_metrics(options, data, tags)
    lock = _lock(options)
    try:
        journal = Journal(options.output_dir)
        try:
            return _evaluate(options, family, candidates, data, journal, tags=tags)
        finally:
            journal.close()
    finally:
        lock.release()


def _evaluate(
    options: EvaluateOptions,
    family: Family,
    candidates: Sequence[Candidate],
    data: EvaluationSet,
    journal: Journal,
    *,
    tags: bool,
) -> Results:
    print_line(f"Evaluating on {count_things(len(data.questions), 'image')}: {data.split}")
    made: list[list[Made | None]] = []
    unreadable = list(data.unreadable)
    for candidate in candidates:
        captions, lines = caption_questions(candidate, data.questions, options, family, journal)
        made.append(captions)
        unreadable += [line for line in lines if line not in unreadable]
    good = [index for index in range(len(data.questions)) if all(captions[index] for captions in made)]
    if not good:
        raise CaptionTrainError(f"--dataset_dir {options.dataset_dir}: no image can be read: {unreadable[0]}")
    questions = [data.questions[index] for index in good]
    captions = [[captions[index] for index in good] for captions in made]
    return _finish(options, candidates, data, questions, captions, unreadable, tags=tags)


def _finish(
    options: EvaluateOptions,
    candidates: Sequence[Candidate],
    data: EvaluationSet,
    questions: Sequence[Question],
    captions: Sequence[Sequence[Made]],
    unreadable: Sequence[str],
    *,
    tags: bool,
) -> Results:
    """Score the captions and write the files."""
    from caption_train.evaluation.results import Results, write_results
    from caption_train.evaluation.scores import score_models

    clip_scores = None
    if options.clip_model:
        from caption_train.evaluation.clip import measure_clip
        from caption_train.system.devices import choose_device

        clip_scores = measure_clip(
            options.clip_model,
            [question.image for question in questions],
            [[caption.text for caption in of_model] for of_model in captions],
            device=choose_device(options.device),
            batch_size=options.batch_size,
        )
    scores = score_models(
        captions,
        [question.references for question in questions],
        tags=tags,
        clip_scores=clip_scores,
        resamples=options.resamples,
        seed=options.seed,
    )
    results = Results(options, data, questions, candidates, captions, scores, unreadable)
    write_results(results)
    return results


def raise_regressions(results: Results) -> None:
    """Raise CaptionTrainError if an adapter is worse than `--fail_on_regression` allows."""
    from caption_train.evaluation.scores import find_regressions

    names = [candidate.name for candidate in results.candidates[1:]]
    worse = find_regressions(
        dict(zip(names, results.scores[1:], strict=True)),
        results.scores[0],
        results.options.read_tolerances(),
        LOWER,
    )
    if worse:
        raise CaptionTrainError(f"--fail_on_regression: {'; '.join(worse)}")


def print_results(results: Results) -> None:
    """Print a line for each model, what could not be read, and where the report is."""
    for candidate, scores in zip(results.candidates, results.scores, strict=True):
        values = ", ".join(f"{name} {score.value:.4g}" for name, score in scores.of_all.items())
        print_result(f"{candidate.name}: {values}")
    if results.unreadable:
        lines = [f"{count_things(len(results.unreadable), 'image')} could not be read:"]
        lines += [f"  {line}" for line in results.unreadable]
        (print_problem if is_quiet() else print_line)(*lines)
    print_line(f"Written to {results.options.output_dir}; open {results.options.output_dir / REPORT_FILE}")


def _use_tags(options: EvaluateOptions, data: EvaluationSet) -> bool:
    if options.tags == "auto":
        return are_tags([reference for question in data.questions for reference in question.references])
    return options.tags == "yes" and data.has_references


def _check_regression_metrics(options: EvaluateOptions, data: EvaluationSet, tags: bool) -> None:
    """Raise UsageError for a metric of `--fail_on_regression` that will not be measured."""
    for name in options.read_tolerances():
        if name in NEED_REFERENCES and not data.has_references:
            raise UsageError(f"--fail_on_regression {name}: the dataset has no captions to compare with")
        if name.startswith("tag_") and not tags:
            raise UsageError(
                f"--fail_on_regression {name}: the captions are no lists of tags; --tags yes says so"
            )
        if name == "clip_score" and not options.clip_model:
            raise UsageError("--fail_on_regression clip_score: give --clip_model")


def _lock(options: EvaluateOptions) -> OutputLock:
    lock = OutputLock(options.output_dir)
    try:
        line = lock.acquire()
    except OSError as error:
        raise CaptionTrainError(
            f"--output_dir {options.output_dir}: cannot be written: {error.strerror or error}"
        ) from error
    if line:
        print_line(line)
    clear_temporary(options.output_dir)
    return lock

"""Defines the flags of evaluate_captions.py; config/training.py explains the form. Standard library only."""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config.fields import LARGEST_SEED, find_above, find_below, find_not_utf8, flag
from caption_train.config.values import check_cache
from caption_train.errors import UsageError

HIGHER = ("cider", "bleu", "rouge_l", "exact_match", "tag_precision", "tag_recall", "tag_f1", "clip_score")
"""Metrics of which more is better."""
LOWER = ("empty", "cut", "repeats")
"""Shares of captions that something is wrong with."""

_data = partial(flag, group="dataset")
_model = partial(flag, group="models")
_captions = partial(flag, group="captions")
_scores = partial(flag, group="scores")
_output = partial(flag, group="output")


@dataclass(frozen=True)
class EvaluateOptions:
    """The flags of evaluate_captions.py."""

    dataset_dir: Path = _data(
        None, "images, with reference captions or without, as the training scripts read them"
    )
    output_dir: Path = _data(
        None, "write evaluation.json, evaluation.md, report.html and the captions made so far to this folder"
    )
    split: str = _data(
        "auto",
        "which rows to caption; auto: the dataset's validation rows, else the images that the first "
        "adapter's run held out of this dataset, else all",
        choices=("auto", "train", "validation", "test", "all"),
    )
    limit: int | None = _data(None, "evaluate N images only, chosen by their content and --seed")
    follow_symlinks: bool = _data(False, "follow links that lead out of the dataset folder")

    peft_model: list[Path] = _model(
        [], "folder of an adapter to compare with its base; repeatable", repeated=True, metavar="PATH"
    )
    base_model: str | None = _model(None, "base model: a hub id or a folder (default: the adapters')")
    family: str | None = _model(None, "family of the model (default: the adapters')")
    revision: str | None = _model(None, "branch, tag or commit of the base model on the hub")
    cache_converted: bool = _model(False, "keep a native copy of a checkpoint in the legacy layout")
    device: str | None = _model(
        None, "device to run on, such as cuda, cuda:1, mps or cpu (found if not given)"
    )
    dtype: str = _model(
        "float32",
        "precision of the models; auto is the one that an adapter was trained in, else bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = _model(
        None, "hold the base in 4-bit NF4 (or 8bit): less memory", choices=("4bit", "8bit"), const="4bit"
    )

    prompt: str | None = _captions(None, "text that all models are given (default: each adapter's own)")
    task: str | None = _captions(None, "task token, instead of --prompt")
    preset: str | None = _captions(None, "a prompt by its name, instead of --prompt")
    system_prompt: str | None = _captions(None, "what the model is told before every prompt")
    max_pixels: int | None = _captions(None, "make images smaller that have more pixels")
    beams: int | None = _captions(None, "beams of the beam search (default: the checkpoint's)")
    max_token_length: int = _captions(256, "longest caption in tokens")
    batch_size: int = _captions(4, "images captioned at once")
    cache_features: bool = _captions(
        False, "keep what the vision tower makes of each image on disk, for all models that share the tower"
    )
    cache_limit: str | None = _captions(
        None,
        "how much disk kept features may take, say, 50GB (if not given, half of what is free)",
        metavar="SIZE",
    )
    num_workers: int = _captions(2, "processes that read and resize images ahead of the model")
    worker_timeout: int = _captions(600, "seconds to wait for a batch of --num_workers; 0 waits for ever")

    tags: str = _scores(
        "auto",
        "score tags one by one; auto: if the references are lists of tags",
        choices=("auto", "yes", "no"),
    )
    clip_model: Path | None = _scores(
        None, "folder of a CLIP-like model: adds a score that needs no references, CLIPScore"
    )
    resamples: int = _scores(2000, "resamples behind intervals and p values")
    seed: int = _scores(42, "seed of resamples and of --limit")
    fail_on_regression: list[str] = _scores(
        [],
        "exit with 1 if an adapter is worse than the base in METRIC, by more than TOLERANCE; repeatable",
        repeated=True,
        metavar="METRIC[=TOLERANCE]",
    )

    no_pictures: bool = _output(False, "leave the pictures out of report.html, to hand it on")
    quiet: bool = _output(False, "print errors and results only", recorded=False)

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        problems = [
            f"--{name} is required" for name in ("dataset_dir", "output_dir") if getattr(self, name) is None
        ]
        if not self.peft_model and not (self.family and self.base_model):
            problems.append("nothing to evaluate: give --peft_model, or --family with --base_model")
        problems += find_not_utf8(self, "dataset_dir", "output_dir", "peft_model", "clip_model")
        problems += find_above(self, LARGEST_SEED, "seed")
        problems += find_below(self, 1, "limit", "beams", "max_token_length", "batch_size", "max_pixels")
        problems += find_below(self, 0, "seed", "num_workers", "worker_timeout")
        problems += find_below(self, 100, "resamples")
        if sum(value is not None for value in (self.prompt, self.task, self.preset)) > 1:
            problems.append("--prompt, --task and --preset name the same thing: give one")
        problems += check_cache(self.cache_features, self.cache_limit)
        if self.fail_on_regression and not self.peft_model:
            problems.append("--fail_on_regression compares adapters with the base: give --peft_model")
        try:
            self.read_tolerances()
        except UsageError as error:
            problems.append(str(error))
        return problems

    def read_tolerances(self) -> dict[str, float]:
        """Return metric → how much worse an adapter may be; UsageError for what is no metric or number."""
        found = {}
        for given in self.fail_on_regression:
            name, _, text = given.partition("=")
            try:
                found[name] = float(text or 0)
            except ValueError:
                found[name] = math.nan
            if name not in HIGHER + LOWER:
                raise UsageError(f"--fail_on_regression {given}: the metrics are {', '.join(HIGHER + LOWER)}")
            if not 0 <= found[name] < math.inf:
                raise UsageError(f"--fail_on_regression {given}: the tolerance is a number, 0 or more")
        return found

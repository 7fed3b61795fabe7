"""Finds what is wrong with single flags of the training scripts. Standard library only."""

import os
from typing import Any

from caption_train.config.fields import LARGEST_SEED, find_above, find_below, find_not_utf8
from caption_train.config.values import METRICS, PARTS, check_cache, check_part_rates, parse_bytes

_COUNTS = (
    *("rank", "max_bad_steps", "keep_last", "batch_size", "gradient_accumulation_steps", "epochs"),
    *("optimizer_rank", "accumulation_rank", "max_pixels", "rank_timeout"),
    *("save_every_n_epochs", "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps"),
    *("eval_every_n_epochs", "eval_every_n_steps", "metric_samples", "early_stopping_patience"),
)


def find_problems(options: Any) -> list[str]:
    """Return what is wrong with TrainOptions, one line each, but for flags that do not go together."""
    problems = [
        f"--{name} is required" for name in ("dataset_dir", "output_dir") if getattr(options, name) is None
    ]
    problems += find_not_utf8(options)
    problems += find_below(options, 1, *_COUNTS) + find_below(options, 2, "max_length")
    problems += find_below(options, 0, "keep_tokens", "num_workers", "worker_timeout", "warmup_steps")
    problems += find_below(options, 0, "weight_decay", "seed")
    problems += find_above(options, LARGEST_SEED, "seed")
    problems += [
        f"--{name} must be above 0, not {getattr(options, name)}"
        for name in ("learning_rate", "alpha", "max_grad_norm", "lora_plus_ratio")
        if getattr(options, name) is not None and not getattr(options, name) > 0
    ]
    problems += [
        f"--{name} is a probability from 0 up to, not including, 1; {getattr(options, name)} is not"
        for name in ("dropout", "caption_dropout")
        if not 0 <= getattr(options, name) < 1
    ]
    problems += [
        f"--{name} {part}: the parts are {', '.join(PARTS)}"
        for name in ("train_parts", "quantize_parts")
        for part in getattr(options, name)
        if part not in PARTS
    ]
    problems += (
        _check_datasets(options)
        + check_part_rates(options.part_learning_rates, options.train_parts or options.unfrozen_parts)
        + _check_validation(options)
    )
    if options.name is not None and (not options.name.strip(". ") or set(options.name) & set("/\\\0")):
        problems.append(f"--name {options.name!r} cannot begin a folder's name: leave out slashes")
    if options.keep_tokens and not options.shuffle_captions:
        problems.append("--keep_tokens only has a meaning with --shuffle_captions")
    if options.prompt is not None and options.task is not None:
        problems.append("--prompt and --task name the same thing twice: give one")
    if options.preset is not None and (options.prompt is not None or options.task is not None):
        problems.append("--preset is a prompt: drop it, or --prompt and --task")
    return problems + _check_sizes(options)


def _check_sizes(options: Any) -> list[str]:
    problems = check_cache(options.cache_features, options.cache_limit)
    if options.memory_budget is not None and not options.plan:
        problems.append("--memory_budget only has a meaning with --plan")
    if options.memory_budget is not None and parse_bytes(options.memory_budget) is None:
        problems.append(f"--memory_budget {options.memory_budget} is no size like 8GB, 7.5GiB or 900MB")
    return problems


def _check_datasets(options: Any) -> list[str]:
    folders, weights = [options.dataset_dir, *options.add_dataset], options.dataset_weights
    problems = [f"--dataset_weights {n}: write whole numbers from 1" for n in weights if n < 1]
    if weights and len(weights) != len(folders):
        problems.append(
            f"--dataset_weights names {len(weights)} weights, but there are {len(folders)} datasets"
        )
    real = [os.path.realpath(folder) for folder in folders if folder is not None]
    twice = {str(folder) for folder in folders if folder and real.count(os.path.realpath(folder)) > 1}
    return problems + [
        f"--dataset_dir {folder} is given twice: use --dataset_weights" for folder in sorted(twice)
    ]


def _check_validation(options: Any) -> list[str]:
    problems = [
        f"--metrics {name}: the metrics are {', '.join(METRICS)}"
        for name in options.metrics
        if name not in METRICS
    ]
    if not 0 <= options.validation_split < 1:
        problems.append(
            f"--validation_split is a fraction, 0 or more and below 1, not {options.validation_split}"
        )
    if options.validation_split and options.validation_dir:
        problems.append("--validation_split and --validation_dir both name validation images: give one")
    if options.metric_for_best not in ("loss", *options.metrics):
        problems.append(f"--metric_for_best {options.metric_for_best} is not measured: add it to --metrics")
    return problems

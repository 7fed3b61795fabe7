"""Reads values of flags that have a form of their own: rates of parts, sizes. Standard library only."""

import re
from collections.abc import Sequence

from caption_train.config.fields import number

PARTS = ("vision", "projector", "language")
METRICS = ("cider", "bleu", "rouge_l", "exact_match")


def check_part_rates(entries: Sequence[str] | None, train_parts: Sequence[str]) -> list[str]:
    """Return everything that is wrong with `--part_learning_rates`, one line each.

    Args:
        entries: its values, such as "vision=1e-5".
        train_parts: the parts to train; all if there are none.
    """
    problems, seen = [], set()
    for entry in entries or []:
        part, shown = entry.partition("=")[0], f"--part_learning_rates {entry}"
        if part not in PARTS:
            problems.append(f"{shown}: write PART=RATE; the parts are {', '.join(PARTS)}")
        elif part in seen:
            problems.append(f"{shown}: {part} has a rate already")
        elif not _is_rate(entry.partition("=")[2]):
            problems.append(f"{shown}: the rate must be a number above 0, as in {part}=1e-5")
        elif train_parts and part not in train_parts:
            problems.append(f"{shown}: {part} is frozen; add it to --train_parts, or drop its rate")
        seen.add(part)
    return problems


def read_part_rates(entries: Sequence[str] | None) -> dict[str, float]:
    """Return part → learning rate, sorted by part, from a checked `--part_learning_rates`.

    >>> read_part_rates(["vision=1e-5", "projector=0.0001"])
    {'projector': 0.0001, 'vision': 1e-05}
    """
    pairs = (entry.split("=") for entry in entries or [])
    return {part: float(rate) for part, rate in sorted(pairs)}


def _is_rate(text: str) -> bool:
    try:
        return number(text) > 0
    except ValueError:
        return False


def check_cache(cache_features: bool, cache_limit: str | None) -> list[str]:
    """Return everything that is wrong with `--cache_limit`, one line each."""
    problems = []
    if cache_limit is not None and not cache_features:
        problems.append("--cache_limit only has a meaning with --cache_features")
    if cache_limit is not None and parse_bytes(cache_limit) is None:
        problems.append(f"--cache_limit {cache_limit} is no size like 50GB, 7.5GiB or 900MB")
    return problems


def parse_bytes(text: str) -> int | None:
    """Return the number of bytes in a size, or None if the text is not a size.

    >>> parse_bytes("8GB"), parse_bytes("7.5 GiB"), parse_bytes("a lot")
    (8000000000, 8053063680, None)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])(i?)B", text.strip(), re.IGNORECASE)
    if found is None:
        return None
    number, unit, is_binary = found.groups()
    return int(float(number) * (1024 if is_binary else 1000) ** (3 if unit in "Gg" else 2))

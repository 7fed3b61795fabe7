"""Makes dataclass fields that are command-line flags, and parses their values. No torch."""

import argparse
import math
import types
import typing
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any


def flag(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str = "general",
    choices: tuple[str, ...] | None = None,
    aliases: tuple[str, ...] = (),
    const: str | None = None,
    metavar: str | None = None,
    repeated: bool = False,
) -> Any:
    """Make a dataclass field that is a command-line flag.

    Args:
        default: value if the flag is not given.
        help: text of the flag in `--help`.
        group: heading of the flag in `--help`.
        choices: allowed values; None allows all.
        aliases: other spellings of the flag.
        const: value if the flag is given without one.
        metavar: placeholder of the value in `--help`.
        repeated: for lists: the flag is given several times, with one value each, instead of once with
            several.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "aliases": aliases,
        "const": const,
        "metavar": metavar,
        "repeated": repeated,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def path(value: str) -> Path | str:
    """Return the path that a flag names. Empty text is refused: it comes from a variable that is not set."""
    # argparse passes the default of a missing positional through here, and then compares it by identity.
    if value is argparse.SUPPRESS:
        return value
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(value)


def number(value: Any) -> float:
    """Return a finite number; raise ValueError for anything else."""
    if not math.isfinite(result := float(value)):
        raise ValueError(value)
    return result


def whole_number(value: Any) -> int:
    """Return a whole number of at most 64 bits, which is all that torch counts with; ValueError otherwise."""
    if not -(2**63) <= (result := int(value)) < 2**63:
        raise ValueError("too large")
    return result


PARSERS = {Path: path, float: number, int: whole_number}
LARGEST_SEED = 2**31 - 1
"""numpy accepts 32 bits, and every process adds its rank to the seed."""


def kind_of(hint: Any) -> Any:
    """Return the type X of `X | None`."""
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def find_below(options: Any, least: int, *names: str) -> list[str]:
    """Return a line for each of these options that is given and less than `least`."""
    return [
        f"--{name} must be {least} or more, not {value}"
        for name in names
        if (value := getattr(options, name)) is not None and value < least
    ]


def find_above(options: Any, most: int, *names: str) -> list[str]:
    """Return a line for each of these options that is greater than `most`."""
    return [
        f"--{name} must be {most} or less, not {value}"
        for name in names
        if (value := getattr(options, name)) > most
    ]

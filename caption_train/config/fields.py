"""What a flag is: a dataclass field with its help, and how its text becomes a value. No torch."""

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

    const: the value of the flag given alone. repeated: a list is given as the flag several times, one value
    each, instead of several values after one flag.
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
    """Return the path that a flag names. Empty text is no path: it comes from a variable that is not set."""
    # argparse sends the default of an absent positional through here, and looks for this very object.
    if value is argparse.SUPPRESS:
        return value
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(value)


def number(value: Any) -> float:
    """Return a finite number; ValueError for anything else."""
    if not math.isfinite(result := float(value)):
        raise ValueError(value)
    return result


PARSERS = {Path: path, float: number}
LARGEST_SEED = 2**31 - 1
"""numpy takes 32 bits, and every process adds its number to the seed."""


def kind_of(hint: Any) -> Any:
    """Return the type behind `X | None`."""
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

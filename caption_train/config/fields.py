"""Makes dataclass fields that are command-line flags, and parses their values. No torch."""

import argparse
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal


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
    recorded: bool | Literal["if given"] = True,
    more: str | None = None,
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
        recorded: whether a trained LoRA keeps the value in its training.json.
        more: the list field that takes the values after the first, where the flag is given several times.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "aliases": aliases,
        "const": const,
        "metavar": metavar,
        "repeated": repeated,
        "recorded": recorded,
        "more": more,
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


def count_or_auto(value: Any) -> int | str:
    """Return a whole number, or "auto"; raise ValueError for anything else."""
    if isinstance(value, float):
        raise ValueError(value)
    return "auto" if value == "auto" else whole_number(value)


CountOrAuto = int | Literal["auto"]
"""The type of a flag that is a number, or is found where the command runs."""
PARSERS = {Path: path, float: number, int: whole_number, CountOrAuto: count_or_auto}
LARGEST_SEED = 2**31 - 1
"""numpy accepts 32 bits, and every process adds its rank to the seed."""


def kind_of(hint: Any) -> Any:
    """Return the type X of `X | None`."""
    if isinstance(hint, types.UnionType) and hint != CountOrAuto:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def find_below(options: Any, least: int, *names: str) -> list[str]:
    """Return a line for each of these options that is given and less than `least`."""
    return [
        f"--{name} must be {least} or more, not {value}"
        for name in names
        if (value := getattr(options, name)) not in (None, "auto") and value < least
    ]


def find_above(options: Any, most: int, *names: str) -> list[str]:
    """Return a line for each of these options that is greater than `most`."""
    return [
        f"--{name} must be {most} or less, not {value}"
        for name in names
        if (value := getattr(options, name)) > most
    ]


def convert_value(value: Any, hint: Any, flag: Field, choices: Sequence[str] | None) -> Any:
    """Convert a value from YAML or Python to the type of a flag.

    Args:
        value: what was given.
        hint: the type of the flag's field.
        flag: the flag.
        choices: allowed values; None allows all.

    Raises:
        ValueError, TypeError, argparse.ArgumentTypeError: it is no value of this flag.
    """
    kind = kind_of(hint)
    if value is False and "no" in (choices or ()):
        # YAML reads `no` as False.
        return "no"
    if value is None:
        if kind is hint and flag.default is not None:
            raise ValueError
        return None
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if flag.metadata["const"] and value is True:
        return flag.metadata["const"]
    if flag.metadata["const"] and value is False:
        return None
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [typing.get_args(kind)[0](item) for item in items]
    if isinstance(value, bool | dict | list) or (kind is int and isinstance(value, float)):
        raise TypeError
    value = PARSERS.get(kind, kind)(value)
    if choices and value not in choices:
        raise ValueError
    return value


def find_not_utf8(options: Any, *exempt: str) -> list[str]:
    r"""Return a line for each option that is not UTF-8, as a file name may be on Linux.

    Such a value trains for an epoch and then cannot be written down: no JSON file can hold it.

    >>> from caption_train.config.exporting import ExportOptions
    >>> find_not_utf8(ExportOptions(source=Path("caf\udce9")))
    ['--source caf\\udce9 is not UTF-8: rename it, or write it in UTF-8']

    Args:
        options: the options of a command.
        exempt: names of options that may be anything.
    """
    problems = []
    for option in fields(options):
        value = getattr(options, option.name) if option.name not in exempt else None
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path) and str(text) != (shown := _escape_surrogates(str(text))):
                problems.append(f"--{option.name} {shown} is not UTF-8: rename it, or write it in UTF-8")
    return problems


def _escape_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()

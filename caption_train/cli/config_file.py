"""Reads flags from the YAML file that --config names."""

import argparse
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from textwrap import shorten
from typing import Any

from caption_train.cli.flag_names import guess_flag
from caption_train.config.fields import convert_value
from caption_train.errors import UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import read_regular_file


def read_config_file(
    path: Path, options_class: type, flags: Mapping[str, Field], choices: Mapping[str, Sequence[str] | None]
) -> dict[str, Any]:
    """Read the file of `--config`.

    Args:
        path: a YAML file.
        options_class: the dataclass with the types of the flags.
        flags: name → field, for the flags of this command.
        choices: name → allowed values; None allows all.

    Returns:
        Name → value, converted to the type of the flag.

    Raises:
        UsageError: the file cannot be read, or lists flags or values that do not exist; names all of them.
    """
    values = _read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must be a mapping of flags to values")
    hints = typing.get_type_hints(options_class)
    problems, config = [], {}
    for name, value in values.items():
        if name not in flags:
            meant = guess_flag(_show(name).strip("'"), flags)
            hint = f"; did you mean {meant}?" if meant else ""
            problems.append(f"--config {path}: unknown key {_show(name)}{hint}")
            continue
        more = flags[name].metadata["more"]
        first, further = value, []
        if more and isinstance(value, list) and value and more not in values:
            first, *further = value
        try:
            config[name] = convert_value(first, hints[name], flags[name], choices[name])
            if further:
                config[more] = convert_value(further, hints[more], flags[more], choices[more])
        except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError):
            problems.append(f"--config {path}: {name}: {_show(value)} is not a valid value")
    if problems:
        raise UsageError("\n".join(problems))
    return config


def _read_yaml(path: Path) -> Any:
    """Return what a YAML file says: the one way in which this toolkit reads one."""
    import yaml

    try:
        text = read_regular_file(path, MAX_BYTES).decode("utf-8-sig")
        _check_shape(yaml.parse(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except RecursionError:
        reason = "nested too deeply"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # yaml has errors of many types for odd values, such as the date 2026-13-45
        reason = " ".join(str(error).partition(";")[0].split()) or type(error).__name__
    raise UsageError(f"--config {path}: cannot be read as YAML: {escape_unprintable(reason)[:300]}")


MAX_BYTES, MAX_ALIASES, MAX_DEPTH = 1 << 20, 10, 20


def _check_shape(events: Iterable[Any]) -> None:
    """Raise ValueError for YAML that would take too long to read, before that is done.

    A few lines of aliases of aliases stand for more values than fit into memory, and each level of nesting
    makes every later token slower.
    """
    aliases = depth = 0
    for event in events:
        kind = type(event).__name__
        aliases += kind == "AliasEvent"
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if aliases > MAX_ALIASES:
            raise ValueError(f"more than {MAX_ALIASES} aliases (*name)")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _show(value: Any) -> str:
    """Return a value on one short line."""
    try:
        return shorten(escape_unprintable(repr(value)), 100, placeholder=" …")[:100]
    except ValueError:
        return "a number of thousands of digits"

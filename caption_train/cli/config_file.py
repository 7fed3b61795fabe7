"""Reads flags from the YAML file that --config names."""

import argparse
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from caption_train.config.fields import convert_value
from caption_train.errors import UsageError


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
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: cannot be read as YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must be a mapping of flags to values")
    hints = typing.get_type_hints(options_class)
    problems, config = [], {}
    for name, value in values.items():
        if name not in flags:
            close = difflib.get_close_matches(str(name), flags, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"--config {path}: unknown key {name!r}{hint}")
            continue
        try:
            config[name] = convert_value(value, hints[name], flags[name], choices[name])
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            problems.append(f"--config {path}: {name}: {value!r} is not a valid value")
    if problems:
        raise UsageError("\n".join(problems))
    return config

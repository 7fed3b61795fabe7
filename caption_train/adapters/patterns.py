"""Tries the regular expressions of an adapter_config.json before PEFT does: some would match for ever."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError
from caption_train.system.signals import NoAnswer, limiting_wait

LONGEST = 20_000
"""Characters that an expression may have: those of a large model's parts have some hundreds."""
SECONDS = 5.0
"""How long all of them may take, on all names of a model's modules: usually some milliseconds."""


def check_patterns(config: Mapping[str, Any], names: Sequence[str], folder: Path | str) -> None:
    """Raise CaptionTrainError for an expression that is broken, or takes too long on the modules' names.

    Args:
        config: the content of adapter_config.json.
        names: the names of the modules of the base.
        folder: the adapter's folder, for messages.
    """
    for field, text, pattern in _list_patterns(config):
        where = f"--peft_model {folder}: adapter_config.json: {field} {text[:60]!r}"
        if len(text) > LONGEST:
            raise CaptionTrainError(
                f"{where}: has {len(text):,} characters, too many for a regular expression"
            )
        try:
            # Python's matching looks for signals now and then, so the alarm ends it.
            with limiting_wait(SECONDS):
                compiled = re.compile(pattern)
                for name in names:
                    compiled.match(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise CaptionTrainError(f"{where}: is no regular expression: {error}") from error
        except NoAnswer:
            raise CaptionTrainError(
                f"{where}: takes longer than {SECONDS:g} seconds to match; write it without nested repetition"
            ) from None


def _list_patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (field, text, expression) of what PEFT takes for regular expressions, as PEFT writes them."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(text := config.get(field), str):
            yield field, text, rf"(?:{text})\Z"
    for field in ("rank_pattern", "alpha_pattern"):
        values = config.get(field)
        for text in values if isinstance(values, dict) else ():
            yield field, text, rf"(.*\.)?({text})$"
    for field, form in (
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("target_parameters", r"(^|.*\.){}($|\..*)"),
    ):
        values = config.get(field)
        for text in [values] if isinstance(values, str) else values if isinstance(values, list) else ():
            if isinstance(text, str):
                yield field, text, form.replace("{}", text)

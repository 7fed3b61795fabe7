"""Writes to the screen: lines printed once for all processes, names made printable, lists cut short."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def print_once(accelerator: Accelerator, *lines: str) -> None:
    """Print lines to stderr, once for all processes."""
    if accelerator.is_main_process:
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def escape_unprintable(text: object) -> str:
    """Return text that takes one line and can be printed: control and lone surrogate characters escaped."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def summarize(headline: str, problems: Sequence[str], limit: int | None = 20) -> str:
    """Return a headline with the first problems, or all of them, below it, one line each."""
    lines = [f"  {escape_unprintable(problem)}" for problem in problems[:limit]]
    more = [f"  … and {len(problems) - limit} more"] if limit and len(problems) > limit else []
    return "\n".join([headline, *lines, *more])

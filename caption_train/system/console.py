"""Prints lines once for all processes, makes names printable, and shortens lists."""

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
    r"""Return text on one line that can be printed: control characters and lone surrogates are escaped.

    >>> escape_unprintable("two\nlines")
    'two\\nlines'
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def summarize(headline: str, problems: Sequence[str], limit: int | None = 20) -> str:
    """Return a headline with problems below it, one per line.

    >>> print(summarize("3 bad rows", ["row 1", "row 5", "row 8"], limit=2))
    3 bad rows
      row 1
      row 5
      … and 1 more

    Args:
        headline: the first line.
        problems: one line each.
        limit: how many problems are shown; None shows all.
    """
    lines = [f"  {escape_unprintable(problem)}" for problem in problems[:limit]]
    more = [f"  … and {len(problems) - limit} more"] if limit and len(problems) > limit else []
    return "\n".join([headline, *lines, *more])

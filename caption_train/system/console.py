"""The one way to write to the screen: lines, tables and progress bars, which `--quiet` turns off.

They go to stderr, above bars that are being drawn. Results (captions, plans, what compiling found) go to
stdout. Errors are printed by cli/exit_codes.py, `--quiet` or not.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from accelerate import Accelerator

GIB = 1024**3
LINE_SECONDS = 30.0
"""Without a terminal, a progress bar is a line this often."""

_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn lines, tables and bars off, or on again; `--quiet`."""
    global _quiet
    _quiet = quiet


def quiet_libraries() -> None:
    """Hide warnings of libraries that are meant for programmers, not for users of this program."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|bitsandbytes|torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def print_line(*lines: str) -> None:
    """Print lines to stderr, above any progress bar."""
    if lines and not _quiet:
        print_problem(*lines)


def is_quiet() -> bool:
    """Return whether `--quiet` was given."""
    return _quiet


def print_problem(*lines: str) -> None:
    """Print what went wrong to stderr, above any progress bar, `--quiet` or not."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def print_once(accelerator: Accelerator, *lines: str) -> None:
    """Print lines to stderr, once for all processes."""
    if accelerator.is_main_process:
        print_line(*lines)


def print_result(line: str) -> None:
    """Print a line of what was asked for to stdout, above any progress bar, `--quiet` or not."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        print(line, flush=True)


def print_rich(*renderables: Any, **settings: Any) -> None:
    """Print rich's tables and text to stderr, above any progress bar; settings: those of `Console.print`."""
    if _quiet:
        return
    from rich.console import Console
    from tqdm import tqdm

    console = Console(stderr=True, markup=False, highlight=False)
    with tqdm.external_write_mode(file=sys.stderr):
        for renderable in renderables:
            console.print(renderable, **settings)


class ProgressBar:
    """How far a long job has come: a bar on a terminal, a line every half minute elsewhere.

    >>> with ProgressBar(2, "checking", "image", shown=False) as bar:
    ...     bar.update()
    """

    def __init__(
        self, total: int, label: str, unit: str, *, initial: int = 0, shown: bool = True, leave: bool = True
    ) -> None:
        """Start a bar.

        Args:
            total: how many units there are.
            label: what is done, such as "training".
            unit: what is counted, such as "step".
            initial: how many were done before, by an earlier run.
            shown: whether this process is the one that shows the bar.
            leave: whether the finished bar stays on the screen.
        """
        from tqdm import tqdm

        self.total, self.label, self.unit = total, label, unit
        self.done, self.first, self.note = initial, initial, ""
        self.shown = shown and not _quiet
        self.started = self.printed = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=initial,
            desc=label,
            unit=f" {unit}",
            leave=leave,
            dynamic_ncols=True,
            # The time left follows from the whole mean, which includes validation, previews and saving.
            smoothing=0,
            disable=not (self.shown and sys.stderr.isatty()),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def set_total(self, total: int) -> None:
        """Say anew how many units there are."""
        self.total = self.bar.total = total

    def update(self, note: str = "", count: int = 1) -> None:
        """Count units as done; the note stands behind the bar, such as the loss."""
        self.done += count
        self.note = note
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.printed >= LINE_SECONDS:
            self.printed = now
            print(self.describe(now - self.started), file=sys.stderr, flush=True)

    def describe(self, seconds: float) -> str:
        """Return the line that stands for the bar where there is no terminal."""
        new = max(self.done - self.first, 1)
        left = _format_seconds(seconds / new * (self.total - self.done))
        note = f", {self.note}" if self.note else ""
        return f"{self.label}: {self.done:,} of {count_things(self.total, self.unit)}, {left} left{note}"


def count_things(count: int, unit: str, units: str = "") -> str:
    """Return a count with its unit, in the plural where it is not one.

    >>> count_things(1, "epoch"), count_things(1200, "image"), count_things(2, "batch", "batches")
    ('1 epoch', '1,200 images', '2 batches')
    """
    return f"{count:,} {unit if count == 1 else units or unit + 's'}"


def _format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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

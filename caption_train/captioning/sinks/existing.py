"""What becomes of captions that are there already: `--existing keep|overwrite|append|prepend`.

Adding to a caption must happen once, whenever a run is killed. So what a run adds is written to a log beside
the captions before it is written to them, with what was there. The next run of the same command finds in the
log what is done, and completes what was cut off between the two. Standard library only.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.captioning.storage.mapping import DiskDict
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError
from caption_train.system.console import escape_unprintable, print_line
from caption_train.system.files import AppendedRows, find_matching, opening_regular_file, parse_rows

_MOST_BYTES = 1 << 30
_SENTENCE_ENDS = tuple(".!?:;,。！？、，；：")
_SHAPING = (
    *("base_model", "peft_model", "endpoint", "model", "prompt", "task", "preset", "system_prompt"),
    *("prompt_template", "prompts", "metadata", "clean", "prefix", "suffix", "trigger", "separator"),
)
"""Flags that make a run that adds to captions another one. How fast, and which images, do not."""


@dataclass(frozen=True)
class Existing:
    """What becomes of captions that are there.

    Attributes:
        mode: keep, overwrite, append or prepend.
        separator: between the old caption and what is added; None chooses by how the first part ends.
        run: identifies runs that add the same, which go on where one of them was cut short.
    """

    mode: str = "keep"
    separator: str | None = None
    run: str = ""

    @classmethod
    def from_options(cls, options: CaptionOptions) -> "Existing":
        """Return what the flags say."""
        mode = "overwrite" if options.replaces else options.existing
        shaping = [str(getattr(options, name)) for name in _SHAPING]
        run = hashlib.sha256(json.dumps([mode, *shaping]).encode()).hexdigest()[:16]
        return cls(mode, options.separator, run)

    @property
    def replaces(self) -> bool:
        """Whether images with a caption are captioned too."""
        return self.mode != "keep"

    @property
    def adds(self) -> bool:
        """Whether old captions become part of new ones."""
        return self.mode in ("append", "prepend")

    def join(self, old: str, added: str) -> str:
        """Return the caption of an image that has the caption `old`.

        >>> Existing("append").join("a cat", "on a mat"), Existing("append").join("A cat.", "It sits.")
        ('a cat, on a mat', 'A cat. It sits.')
        >>> Existing("prepend", separator=" | ").join("a cat", "photo")
        'photo | a cat'
        """
        if not self.adds:
            return added
        first, second = (old, added) if self.mode == "append" else (added, old)
        separator = self.separator
        if separator is None:
            separator = " " if first.endswith(_SENTENCE_ENDS) else ", "
        return f"{first}{separator}{second}" if first and second else first or second


KEEP = Existing()


@dataclass(frozen=True)
class Added:
    """One entry of the log. was: the captions that were there, if there were any. text: what is added."""

    was: tuple[str, ...]
    text: str


class AddedLog:
    """What a run that adds to captions has added in one folder: `.NAME.RANK.added`, a line an image.

    Args:
        folder: the folder of the captions.
        name: what the log belongs to, such as the name of the `--output` file.
        rank: the rank of this process.
        where: the flag and its value, for messages.
    """

    def __init__(self, folder: Path, name: str, rank: int, where: str) -> None:
        self._folder = folder
        self._pattern = re.compile(rf"\.{re.escape(name)}\.\d+\.added", re.DOTALL)
        self._file = AppendedRows(folder / f".{name}.{rank}.added", is_synced=True)
        self._where = where
        self.is_complete = False
        """Whether the run was killed at its very end, when all was added and its logs were being deleted."""

    def read(self, run: str) -> DiskDict[tuple[tuple[str, ...], str]]:
        """Return (what was there, what is added) of what runs like this one have added, by name.

        What others had not finished is forgotten.
        """
        entries: DiskDict[tuple[tuple[str, ...], str]] = DiskDict()
        abandoned = 0
        for path in self._find():
            count, is_ours = 0, False
            for row in self._read(path):
                count += 1
                if row["run"] != run:
                    continue
                is_ours = True
                if "done" in row:
                    self.is_complete = True
                else:
                    entries[row["name"]] = tuple(row["was"]), row["text"]
            if count and not is_ours:
                abandoned += count
                path.unlink(missing_ok=True)
        if abandoned:
            print_line(
                f"{self._where}: a run with other settings was cut short after it had added to {abandoned} "
                "captions; they stay as they are, and this one adds to them too"
            )
        return entries

    def note(self, run: str, name: str, added: Added) -> None:
        """Write down what is about to be added to a caption, and wait until it is on the disk."""
        self._append({"run": run, "name": name, "was": added.was, "text": added.text})

    def mark_done(self, run: str) -> None:
        """Write down that all is added, before the first log of the run is deleted."""
        if self._find():
            self._append({"run": run, "done": True})

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.append(row)
        except OSError as error:
            shown = escape_unprintable(self._file.path)
            raise CaptionTrainError(
                f"{self._where}: {shown} cannot be written: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def discard(self) -> None:
        """Delete the logs of all processes: what they say is done, or void."""
        self.close()
        for path in self._find():
            path.unlink(missing_ok=True)

    def _find(self) -> list[Path]:
        return find_matching(self._folder, ".", self._pattern)

    def _read(self, path: Path) -> Iterator[Mapping[str, Any]]:
        try:
            with opening_regular_file(path, _MOST_BYTES, is_own=True) as file:
                yield from filter(_is_entry, parse_rows(file))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CaptionTrainError(
                f"{self._where}: {escape_unprintable(path)}: {reason}, where it would say what a run has "
                "added that was cut short; move it away"
            ) from error


def _is_entry(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("run"), str):
        return False
    return row.get("done") is True or (
        all(isinstance(row.get(name), str) for name in ("name", "text"))
        and isinstance(row.get("was"), list)
        and all(isinstance(text, str) for text in row["was"])
    )

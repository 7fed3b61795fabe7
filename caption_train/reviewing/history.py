"""Keeps every edit in a file beside the images, so that it can be undone after a restart.

    images/.caption-train-review.jsonl      one line an event, only ever appended to

An edit is written down before its caption is written: after a kill it can be undone, or has not happened and
its undoing changes nothing. `void` follows where the caption could not be written.
"""

import json
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_own, parse_json, read_regular_file

HISTORY_NAME = ".caption-train-review.jsonl"
_MOST_BYTES = 1 << 30


@dataclass
class Edit:
    """One caption that was changed, from `before` to `after`."""

    name: str
    before: str
    after: str
    is_undone: bool = False


@dataclass
class Mark:
    """What was marked of one image: "accepted", a caption or None, and "flagged", each before and after."""

    name: str
    before: dict[str, Any]
    after: dict[str, Any]
    is_undone: bool = False


@dataclass
class Batch:
    """Edits and marks that were made in one step, and are undone in one.

    Attributes:
        id: names it.
        action: "edit", "suggestion", "conflict", "replace", "mark" or "undo".
        time: when, in UTC.
        edits: by the image's name.
        marks: by the image's name.
        undoes: the batch that this one undid.
    """

    id: str
    action: str
    time: str
    edits: dict[str, Edit] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)
    undoes: str | None = None

    @property
    def can_be_undone(self) -> bool:
        """Whether an edit or a mark of it stands."""
        made = [*self.edits.values(), *self.marks.values()]
        return self.action != "undo" and any(not done.is_undone for done in made)


class History:
    """The events of a folder, and what they add up to.

    Attributes:
        batches: by id, oldest first.
        accepted: image name → the caption that was accepted.
        flagged: names of flagged images.
        originals: image name → its caption before the first edit.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / HISTORY_NAME
        self.reload()

    def reload(self) -> None:
        """Read the file again: another review of the same folder may have written to it.

        Raises:
            UsageError: it cannot be read.
        """
        self.batches: dict[str, Batch] = {}
        self.accepted: dict[str, str] = {}
        self.flagged: set[str] = set()
        self.originals: dict[str, str] = {}
        for event in self._read():
            self._apply(event)

    def begin(self, action: str, edits: Iterable[tuple[str, str, str]], undoes: str | None = None) -> Batch:
        """Write down edits that are about to be made.

        Args:
            action: what they are.
            edits: (image name, caption before, caption after).
            undoes: the batch that they undo.
        """
        batch = Batch(secrets.token_hex(8), action, _now(), undoes=undoes)
        shared = _describe(batch)
        self._append([shared | {"name": n, "before": b, "after": a} for n, b, a in edits])
        return self.batches.get(batch.id) or batch

    def void(self, batch: Batch, names: Sequence[str]) -> None:
        """Write down that edits were not made after all."""
        self._append([{"batch": batch.id, "action": "void", "name": name} for name in names])

    def mark(self, marks: Mapping[str, Mapping[str, Any]], batch: Batch | None = None) -> None:
        """Write down marks, to be undone in one step.

        Args:
            marks: image name → "accepted", a caption or None, and "flagged", or one of them.
            batch: the step that they belong to; by default one of their own.
        """
        shared = _describe(batch or Batch(secrets.token_hex(8), "mark", _now())) | {"action": "mark"}
        self._append([shared | {"name": name} | values for name, values in marks.items()])

    def find_marks(self, name: str) -> dict[str, Any]:
        """Return the marks that an image has."""
        return {"accepted": self.accepted.get(name), "flagged": name in self.flagged}

    def last(self, passed: Collection[str] = ()) -> Batch | None:
        """Return the newest batch that can be undone, none of whose id is in `passed`."""
        found = (b for b in reversed(self.batches.values()) if b.can_be_undone and b.id not in passed)
        return next(found, None)

    def _apply(self, event: Any) -> None:
        if not isinstance(event, dict) or not isinstance(name := event.get("name"), str):
            return
        if event.get("action") == "mark":
            self._apply_mark(name, event)
        elif event.get("action") == "void":
            self._apply_void(name, event)
        elif all(isinstance(event.get(k), str) for k in ("batch", "action", "time", "before", "after")):
            self._apply_edit(name, event)

    def _apply_mark(self, name: str, event: dict) -> None:
        after = {"flagged": bool(event["flagged"])} if "flagged" in event else {}
        if isinstance(accepted := event.get("accepted", 0), str | None):
            after["accepted"] = accepted
        before = {key: value for key, value in self.find_marks(name).items() if key in after}
        if "accepted" in after:
            self.accepted.pop(name, None)
        if after.get("accepted") is not None:
            self.accepted[name] = after["accepted"]
        if "flagged" in after:
            (self.flagged.add if after["flagged"] else self.flagged.discard)(name)
        # Marks of older versions belong to no step.
        if all(isinstance(event.get(key), str) for key in ("batch", "time")):
            batch = self._open(event)
            batch.marks[name] = Mark(name, before, after)
            if (undone := self._find_batch(batch.undoes)) and name in undone.marks:
                undone.marks[name].is_undone = True

    def _apply_void(self, name: str, event: dict) -> None:
        batch = self._find_batch(event.get("batch"))
        if batch and batch.edits.pop(name, None) and (undone := self._find_undone(batch, name)):
            undone.is_undone = False

    def _apply_edit(self, name: str, event: dict) -> None:
        batch = self._open(event)
        batch.edits[name] = Edit(name, event["before"], event["after"])
        self.originals.setdefault(name, event["before"])
        if undone := self._find_undone(batch, name):
            undone.is_undone = True

    def _open(self, event: dict) -> Batch:
        """Return the batch of an event, a new one for its first."""
        undoes = event.get("undoes") if isinstance(event.get("undoes"), str) else None
        action = "undo" if undoes else event["action"]
        return self.batches.setdefault(
            event["batch"], Batch(event["batch"], action, event["time"], undoes=undoes)
        )

    def _find_batch(self, id: Any) -> Batch | None:
        return self.batches.get(id) if isinstance(id, str) else None

    def _find_undone(self, batch: Batch, name: str) -> Edit | None:
        before = self._find_batch(batch.undoes)
        return before.edits.get(name) if before else None

    def _append(self, events: Sequence[dict[str, Any]]) -> None:
        if not events:
            return
        # json escapes what is not ASCII, so names that are not UTF-8 can be written too.
        lines = "".join(json.dumps(event) + "\n" for event in events).encode()
        try:
            descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                # A kill may have left half a line.
                if os.fstat(descriptor).st_size and _read_last(descriptor) != b"\n":
                    lines = b"\n" + lines
                while lines:
                    lines = lines[os.write(descriptor, lines) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            where = escape_unprintable(self.path)
            raise CaptionTrainError(f"{where}: cannot be written: {error.strerror or error}") from error
        for event in events:
            self._apply(event)

    def _read(self) -> Iterable[Any]:
        try:
            content = read_regular_file(self.path, _MOST_BYTES, is_own=True)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{escape_unprintable(self.path)}: {reason}; move it away") from error
        for line in content.split(b"\n"):
            try:
                yield parse_json(line)
            except ValueError:
                continue  # the last line of a killed process


def _read_last(descriptor: int) -> bytes:
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe(batch: Batch) -> dict[str, str]:
    """Return what every event of a batch says."""
    undoes = {"undoes": batch.undoes} if batch.undoes else {}
    return {"batch": batch.id, "action": batch.action, "time": batch.time} | undoes

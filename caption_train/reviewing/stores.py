"""Reads and writes captions where training finds them, and never over what somebody else wrote.

Every write names the caption that it replaces. One that is different by now is not touched: the outcome is a
conflict, with the caption that is there.
"""

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from caption_train.captioning.sinks.caption_paths import CaptionPaths
from caption_train.captioning.sinks.row_text import JsonLines, TextRow
from caption_train.captioning.sinks.sidecars import encode_caption
from caption_train.data.formats import MAX_CAPTION_BYTES, METADATA_NAME, TEXT_COLUMNS
from caption_train.data.text import join_lines, read_caption, refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.reviewing.items import Item, Library
from caption_train.system.console import escape_unprintable
from caption_train.system.exclusive import Signature, create_atomically, remove_unchanged, replace_unchanged
from caption_train.system.files import read_regular_file

MOST_TRIES = 50
WRITERS = 16


@dataclass(frozen=True)
class Change:
    """One caption to write. base: the caption that it replaces; empty where there is none."""

    item: Item
    base: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What became of a change.

    Attributes:
        change: the change.
        theirs: the caption that is there instead of `base`; then nothing was written.
        problem: why it could not be written, if it could not.
    """

    change: Change
    theirs: str | None = None
    problem: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the caption was written."""
        return self.theirs is None and not self.problem


class Store(ABC):
    """A place of captions. An empty caption is none: its file or row is removed."""

    @abstractmethod
    def read_all(self, items: Mapping[str, Item]) -> tuple[dict[str, str], dict[str, str]]:
        """Return the captions that there are, by id, and what is wrong with those that cannot be edited."""

    @abstractmethod
    def read(self, item: Item) -> str:
        """Return the caption of one image as it is now; CaptionTrainError if it cannot be read."""

    @abstractmethod
    def write(self, changes: Sequence[Change]) -> list[Outcome]:
        """Write captions; the outcomes stand in the order of the changes."""

    def clean(self, text: str) -> str:
        """Return a caption as this store keeps it.

        Raises:
            CaptionTrainError: no caption can be so long, or hold such characters.
        """
        text = text.strip()
        if len(text.encode(errors="surrogatepass")) > MAX_CAPTION_BYTES:
            raise CaptionTrainError(f"a caption has {MAX_CAPTION_BYTES:,} bytes at most")
        try:
            refuse_odd_characters(text)
        except ValueError as error:
            raise CaptionTrainError(f"a caption cannot have {error}") from None
        return text


class FileStore(Store):
    """A caption file beside every image, named as captioning and training name it."""

    def __init__(self, library: Library, extension: str) -> None:
        self._library = library
        self._extension = extension
        self._paths = CaptionPaths(extension)
        self._read: dict[Path, tuple[Signature, str]] = {}

    def read_all(self, items: Mapping[str, Item]) -> tuple[dict[str, str], dict[str, str]]:
        self._paths = CaptionPaths(self._extension)  # which lists folders once
        captions, problems = {}, {}
        for id, item in items.items():
            try:
                captions[id] = self.read(item)
            except CaptionTrainError as error:
                problems[id] = str(error)
        return captions, problems

    def read(self, item: Item) -> str:
        found = self._paths.find(item.path)
        return "" if found is None else self._read_file(found)[1]

    def clean(self, text: str) -> str:
        return join_lines(super().clean(text))

    def write(self, changes: Sequence[Change]) -> list[Outcome]:
        # Almost all of the time goes into flushing files to the disk, which takes several at once.
        with ThreadPoolExecutor(WRITERS) as pool:
            return list(pool.map(self._write, changes))

    def _write(self, change: Change) -> Outcome:
        path = self._paths.path_of(change.item.path)
        try:
            for _ in range(MOST_TRIES):
                found = self._paths.find(change.item.path)
                was, text = (None, "") if found is None else self._read_file(found)
                if text != change.base:
                    return Outcome(change, theirs=text)
                if self._put(path, change.text, found, was):
                    return Outcome(change)
        except CaptionTrainError as error:
            return Outcome(change, problem=str(error))
        except OSError as error:
            reason = f"{escape_unprintable(path)}: cannot be written: {error.strerror or error}"
            return Outcome(change, problem=reason)
        return Outcome(change, problem=f"{escape_unprintable(path)}: something else writes it all the time")

    def _put(self, path: Path, text: str, found: Path | None, was: Signature | None) -> bool:
        """Write or remove one file; False where it is no longer what was read."""
        own = found == path
        if not text and found is not None and not own:
            raise CaptionTrainError(
                f"{escape_unprintable(found)}: is another image's caption too; delete it there"
            )
        if not text:
            return was is None or remove_unchanged(self._library.check(path), was)
        content = encode_caption(path, text)
        if own and was is not None:
            return replace_unchanged(self._library.check(path), content, was)
        # A caption that two images share stays: this one gets a file of its own.
        self._library.check(path.parent)
        return create_atomically(path, content)

    def _read_file(self, path: Path) -> tuple[Signature | None, str]:
        real = self._library.check(path)
        # Before the file is read: what is written while we read it changes the signature.
        was = Signature.of(real)
        known = self._read.get(real)
        if known and known[0] == was:
            return known
        text = read_caption(real)
        if was is not None:
            self._read[real] = (was, text)
        return was, text


class MetadataStore(Store):
    """The rows of a metadata.jsonl in the folder; all else in it stays as it is, to the byte."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._path = library.root / METADATA_NAME
        self._load()

    def read_all(self, items: Mapping[str, Item]) -> tuple[dict[str, str], dict[str, str]]:
        rows = self._index(self._load()[1])
        problems = {id: _not_utf8(item) for id, item in items.items() if not _is_utf8(item.name)}
        texts = {id: _text_of(rows.get(item.name, [])) for id, item in items.items()}
        return {id: text for id, text in texts.items() if id not in problems}, problems

    def read(self, item: Item) -> str:
        return _text_of(self._index(self._load()[1]).get(item.name, []))

    def write(self, changes: Sequence[Change]) -> list[Outcome]:
        try:
            for _ in range(MOST_TRIES):
                was, table = self._load()
                outcomes = self._apply(table, changes)
                if not any(outcome.is_done for outcome in outcomes) or self._publish(table, was):
                    return outcomes
            reason = f"{METADATA_NAME}: something else writes it all the time"
        except CaptionTrainError as error:
            reason = str(error)
        except OSError as error:
            reason = f"{METADATA_NAME}: cannot be written: {error.strerror or error}"
        return [Outcome(change, problem=reason) for change in changes]

    def _publish(self, table: JsonLines, was: Signature | None) -> bool:
        content = table.render().encode()
        real = self._library.check(self._path)
        return create_atomically(real, content) if was is None else replace_unchanged(real, content, was)

    def _apply(self, table: JsonLines, changes: Sequence[Change]) -> list[Outcome]:
        rows, outcomes = self._index(table), []
        for change in changes:
            own = rows.get(change.item.name, [])
            text = _text_of(own)
            if not _is_utf8(change.item.name):
                outcomes.append(Outcome(change, problem=_not_utf8(change.item)))
            elif text != change.base:
                outcomes.append(Outcome(change, theirs=text))
            else:
                _put_row(table, own, change)
                outcomes.append(Outcome(change))
        return outcomes

    def _load(self) -> tuple[Signature | None, JsonLines]:
        real = self._library.check(self._path)
        was = Signature.of(real)
        try:
            return was, JsonLines(read_regular_file(real).decode())
        except FileNotFoundError:
            return None, JsonLines("")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{escape_unprintable(self._path)}: cannot be edited: {reason}") from error

    def _index(self, table: JsonLines) -> dict[str, list[TextRow]]:
        rows: dict[str, list[TextRow]] = {}
        for row in table.rows:
            name = row.values.get("file_name") if isinstance(row.values, dict) else None
            if isinstance(name, str):
                rows.setdefault(posixpath.normpath(name.replace("\\", "/")), []).append(row)
        return rows


def _put_row(table: JsonLines, rows: Sequence[TextRow], change: Change) -> None:
    """Write a caption to the rows that have the one it replaces; other captions of the image stay."""
    if not rows:
        if change.text:
            table.add({"file_name": change.item.name, "text": change.text})
        return
    for row in [row for row in rows if _text_of([row]) == change.base]:
        if not change.text and set(row.values) <= {"file_name", "text"}:
            table.rows.remove(row)
        else:
            table.change(row, {"text": change.text})


def _text_of(rows: Sequence[TextRow]) -> str:
    """Return the caption that training reads in an image's first row that has one."""
    for row in rows:
        text = next((row.values[name] for name in TEXT_COLUMNS if row.values.get(name) is not None), "")
        if isinstance(text, str) and text.strip():
            return text.strip()
    return ""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_utf8(item: Item) -> str:
    return f"{escape_unprintable(item.name)}: its name is not UTF-8, which no row can hold: rename it"


def open_store(library: Library, save_to: str, extension: str) -> Store:
    """Return where the captions of a folder are.

    Args:
        library: the images.
        save_to: "files", "metadata", or "auto": the metadata.jsonl if there is one.
        extension: of the caption files.

    Raises:
        UsageError: the folder cannot be written to, or its metadata.jsonl is damaged.
    """
    if not os.access(library.root, os.W_OK):
        raise UsageError(f"--images {escape_unprintable(library.root)}: cannot be written to")
    has_metadata = os.path.lexists(library.root / METADATA_NAME)
    if save_to == "metadata" or (save_to == "auto" and has_metadata):
        return MetadataStore(library)
    return FileStore(library, extension)

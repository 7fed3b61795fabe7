"""Writes all captions of a run to one file, so that a killed run loses none. Standard library only."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from caption_train.data.formats import TEXT_COLUMNS
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_atomically, parse_json
from caption_train.system.lock import OutputLock

Row = dict[str, Any]
"""`file_name`, `text` and, if there are any, `answer` (boxes) and `remarks`; other columns stay as found."""


class CaptionFile:
    """All captions in one `.jsonl` or `.csv` file, one row per image; `metadata.jsonl` is a dataset's own.

    New rows go at once to a journal beside the file, one journal per process. `merge` writes the file from
    its old rows and the journals. The next run reads the journals that a killed run has left.

    Args:
        path: the file.
        rank: the rank of this process, which names its journal.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.is_dataset = path.name == "metadata.jsonl"
        self._folder = path.parent.resolve()
        self._journal_path = path.with_name(f".{path.name}.{rank}.part")
        self._journal: io.FileIO | None = None
        self._lock = OutputLock(path.parent, f".{path.name}.lock", f"--output {path}")
        self._prefixes: dict[Path, str] = {}

    def lock(self) -> None:
        """Keep other runs from removing these journals; raise CaptionTrainError if one is already running."""
        self._lock.acquire()

    def unlock(self) -> None:
        """Allow other runs to write to the file."""
        self._lock.release()

    def name_of(self, image: Path) -> str:
        """Return an image's `file_name`: relative for images below the file's folder, otherwise absolute.

        Raises:
            UsageError: no row can name this image.
        """
        if image.parent not in self._prefixes:
            self._prefixes[image.parent] = self._prefix_of(image.parent)
        name = self._prefixes[image.parent] + image.name
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--output {self.path}: {escape_unprintable(image)} has a name that is not UTF-8, which no "
                "row can hold: rename it, or use --save_captions"
            ) from None
        return name

    def read(self) -> dict[str, str]:
        """Return `file_name` → caption, from the file and then from journals that killed runs have left."""
        captions = {}
        for row in (*self._read_file(), *self._read_journals().values()):
            texts = (row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str))
            if (text := next(texts, None)) is not None:
                captions[row["file_name"]] = text
        return captions

    def append(self, image: Path, text: str, *, answer: Any = None, remarks: Iterable[str] = ()) -> None:
        """Write a caption to the journal.

        Args:
            image: the image.
            text: its caption.
            answer: boxes or polygons in it, if any.
            remarks: keys of REMARKS.
        """
        row = {"file_name": self.name_of(image), "text": text, "answer": answer, "remarks": list(remarks)}
        if self.is_dataset:
            row = {"file_name": row["file_name"], "text": text}
        row = {name: value for name, value in row.items() if name in ("file_name", "text") or value}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            if self._journal is None:
                # Unbuffered: data that could not be written would raise again when the file is closed.
                self._journal = self._journal_path.open("ab", buffering=0)
                line = b"\n" + line  # A killed process may have left half a line.
            if self._journal.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CaptionTrainError(f"{self._journal_path}: {error.strerror or error}") from error

    def merge(self, images: Iterable[Path] = ()) -> None:
        """Write the file: first the rows of other images as they were, then those of `images` in their order.

        An image may have several rows; all of them get its new caption.
        """
        new, rows = self._read_journals(), []
        for row in self._read_file():
            if update := new.get(row["file_name"]):
                replaced = ("answer", "remarks", "text")
                row = {name: value for name, value in row.items() if name not in replaced} | update
            rows.append(row)
        known = {row["file_name"] for row in rows}
        rows += [row for name, row in new.items() if name not in known]
        places = {name: place for place, name in enumerate(map(self.name_of, images))}
        # A stable sort: rows of other images (-1) come first, in their old order.
        rows.sort(key=lambda row: places.get(row["file_name"], -1))
        write = _write_csv if self.path.suffix == ".csv" else _write_jsonl
        try:
            with open_atomically(self.path) as file:
                write(file, rows)
        except OSError as error:
            raise CaptionTrainError(f"--output {self.path}: {error.strerror or error}") from error

    def take_over(self) -> None:
        """Merge the journals of interrupted runs into the file, and remove them."""
        if self._journals():
            self.merge()
            self.discard_journals()

    def discard_journals(self) -> None:
        """Remove the journals of this run and of earlier ones."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        for journal in self._journals():
            journal.unlink(missing_ok=True)

    def _prefix_of(self, folder: Path) -> str:
        folder = folder.resolve()
        if folder == self._folder:
            return ""
        if folder.is_relative_to(self._folder):
            return folder.relative_to(self._folder).as_posix() + "/"
        if self.is_dataset:
            raise UsageError(
                f"--output {self.path}: {folder} is not below it, and a dataset cannot reach outside: "
                "put metadata.jsonl above the images, or name the file captions.jsonl"
            )
        return folder.as_posix().rstrip("/") + "/"

    def _journals(self) -> list[Path]:
        return sorted(
            p
            for p in self.path.parent.iterdir()
            if p.name.startswith(f".{self.path.name}.") and p.name.endswith(".part")
        )

    def _read_journals(self) -> dict[str, Row]:
        rows = {}
        for journal in self._journals():
            for line in journal.read_bytes().split(b"\n"):
                try:
                    row = parse_json(line)
                except ValueError:
                    continue  # The last line of a killed process, cut within a character perhaps.
                if isinstance(row, dict) and isinstance(row.get("file_name"), str):
                    rows[row["file_name"]] = row
        return rows

    def _read_file(self) -> list[Row]:
        if not self.path.exists():
            return []
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
            rows = list(_read_csv(text) if self.path.suffix == ".csv" else _read_jsonl(text))
        except (OSError, ValueError, csv.Error) as error:
            raise UsageError(f"--output {self.path}: the file there cannot be continued: {error}") from error
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise UsageError(
                    f"--output {self.path}: row {number} of that file has no file_name: name another file"
                )
        return rows


def _read_jsonl(text: str) -> Iterable[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from None


def _read_csv(text: str) -> Iterable[Row]:
    for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
        yield {name: value for name, value in row.items() if name is not None}


def _write_jsonl(file: IO[str], rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_csv(file: IO[str], rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    columns = list(dict.fromkeys(["file_name", "text", *(name for row in rows for name in row)]))
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _to_cell(value) for name, value in row.items()})


def _to_cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)

"""Rows of a `.jsonl` or `.csv` file that keep the text they have: what nobody changes is written as it was.

Reading and writing a row again would lose the digits of its numbers, members that stand there twice, cells
beyond the header, and lone surrogates, which no file can hold but as `\\ud83d`. Standard library only.
"""

import csv
import io
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.decoder import scanstring
from pathlib import Path
from typing import Any

from caption_train.system.files import opening_regular_file, parse_json, read_text_lines

Row = dict[str, Any]
"""`file_name`, `text`, where there are any `answer` (boxes) and `remarks`; other columns stay as found"""
REPLACED = ("text", "answer", "remarks")
"""What belongs to the caption and is replaced with it."""


@dataclass
class TextRow:
    """One row. text: as it stands in the file, with the blank lines before it. values: what it says.

    cells: of a table's row that is not as it was, to be written instead of the text.
    """

    text: str
    values: Row
    cells: list[str] | None = None


class Table(ABC):
    """All rows of a file, and what is not of a row: a byte order mark, a header."""

    _newline: str
    """What ends a line, as `open` takes it."""

    def __init__(self, text: str = "") -> None:
        """
        Args:
            text: all that the file holds; for one that is larger than memory nothing, see `read`.

        Raises:
            ValueError: a row cannot be read.
        """
        self._mark = ""
        self.rows = list(self.read(io.StringIO(text, newline=self._newline)))

    def read(self, lines: Iterable[str]) -> Iterator[TextRow]:
        """Yield the rows of a file, which are not kept in `rows`.

        lines: the text of the file in pieces that end with `\\n`, the last one perhaps without.

        Raises:
            ValueError: a row cannot be read.
        """
        yield from self._read(self._take_mark(lines))

    def open(self, path: Path, limit: int) -> Iterator[TextRow]:
        """Yield the rows of a file, as they are asked for.

        Raises:
            OSError, ValueError, csv.Error: it cannot be read.
        """
        with opening_regular_file(path, limit) as file:
            yield from self.read(read_text_lines(file, path))

    def render(self) -> str:
        """Return all that the file is to hold."""
        return "".join(self.render_rows(self.rows))

    def render_rows(self, rows: Iterable[TextRow]) -> Iterator[str]:
        """Yield what a file of these rows is to hold, piece by piece."""
        yield self._mark
        for text in itertools.chain([self._head()], map(self._text_of, rows)):
            # The last line of a file need not end; between others it must.
            yield text + self._end if text and text[-1] not in "\r\n" else text

    def sort(self, key: Callable[[Row], int]) -> None:
        """Put the rows in order."""
        self.rows.sort(key=lambda row: key(row.values))

    @abstractmethod
    def change(self, row: TextRow, caption: Row, replaceable: Sequence[str] = REPLACED) -> None:
        """Give a row another caption; all else in it but `replaceable` stays as it is."""

    def add(self, caption: Row) -> None:
        """Add a row."""
        self.rows.append(self.make(caption))

    @abstractmethod
    def make(self, caption: Row) -> TextRow:
        """Return a new row."""

    @abstractmethod
    def parse(self, text: str) -> TextRow:
        """Return a row that was read before."""

    @abstractmethod
    def _read(self, lines: Iterable[str]) -> Iterator[TextRow]: ...

    @property
    def _end(self) -> str:
        return "\n"

    def _take_mark(self, lines: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(lines):
            if not number and line.startswith("\ufeff"):
                self._mark = "\ufeff"
                line = line.removeprefix("\ufeff")
            yield line

    def _head(self) -> str:
        return ""

    def _text_of(self, row: TextRow) -> str:
        return row.text


class JsonLines(Table):
    """A JSON object a line."""

    # JSON may hold other line ends within a row.
    _newline = "\n"

    def change(self, row: TextRow, caption: Row, replaceable: Sequence[str] = REPLACED) -> None:
        line = row.text.rstrip("\r\n")
        end = row.text[len(line) :] or "\n"
        kept = [text for name, text in _members(line) if name not in replaceable]
        new = [_dump_member(name, value) for name, value in caption.items() if name in replaceable]
        row.text = "{" + ", ".join(kept + new) + "}" + end
        row.values = {name: value for name, value in row.values.items() if name not in replaceable} | caption

    def make(self, caption: Row) -> TextRow:
        members = (_dump_member(name, value) for name, value in caption.items())
        return TextRow("{" + ", ".join(members) + "}\n", caption)

    def parse(self, text: str) -> TextRow:
        return TextRow(text, parse_json(text))

    def _read(self, lines: Iterable[str]) -> Iterator[TextRow]:
        blank = ""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                blank += line
                continue
            try:
                values = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from None
            yield TextRow(blank + line, values)
            blank = ""


class CsvTable(Table):
    """A table with a header."""

    _newline = ""

    def __init__(self, text: str = "") -> None:
        self._columns: list[str] = []
        self._header = ""
        self._width = 0
        super().__init__(text)

    @property
    def _end(self) -> str:
        return "\n" if self._header.endswith("\n") and not self._header.endswith("\r\n") else "\r\n"

    def change(self, row: TextRow, caption: Row, replaceable: Sequence[str] = REPLACED) -> None:
        cells = _read_cells(row.text)
        replaced = [name for name in replaceable if name in caption or name in self._columns]
        self._put(row, cells, {name: caption.get(name) for name in replaced})
        row.values |= caption

    def make(self, caption: Row) -> TextRow:
        row = TextRow("", caption)
        self._put(row, [], caption)
        return row

    def parse(self, text: str) -> TextRow:
        return TextRow(text, dict(zip(self._columns, _read_cells(text), strict=False)))

    def _put(self, row: TextRow, cells: list[str], values: Mapping[str, Any]) -> None:
        self._add_columns([name for name in values if name not in self._columns])
        cells += [""] * (len(self._columns) - len(cells))
        for name, value in values.items():
            cells[_last_index(self._columns, name)] = _to_cell(value)
        row.cells = cells

    def _add_columns(self, names: list[str]) -> None:
        if not self._columns:
            names = list(dict.fromkeys(["file_name", *(names or ["text"])]))
        if names:
            # Cells beyond the header stay beyond what it says.
            self._columns += [""] * (self._width - len(self._columns)) + names
            self._header = _write_cells(self._columns, self._end)

    def _head(self) -> str:
        if not self._columns:
            self._add_columns([])
        return self._header

    def _text_of(self, row: TextRow) -> str:
        if row.cells is None:
            return row.text
        return _write_cells(row.cells + [""] * (len(self._columns) - len(row.cells)), self._end)

    def _read(self, lines: Iterable[str]) -> Iterator[TextRow]:
        taken: list[str] = []

        def take() -> Iterator[str]:
            for text in lines:
                # A line may end in \r alone, too.
                for line in io.StringIO(text, newline="") if "\r" in text else (text,):
                    taken.append(line)
                    yield line

        for cells in csv.reader(take(), strict=True):
            if not cells:
                continue  # A blank line, which the next row begins with.
            record, self._width = "".join(taken), max(self._width, len(cells))
            taken.clear()
            if self._columns:
                yield TextRow(record, dict(zip(self._columns, cells, strict=False)))
            else:
                self._columns, self._header = cells, record


def make_table(path: Path) -> Table:
    """Return the empty table that a file is read into, by the ending of its name."""
    return CsvTable() if path.suffix == ".csv" else JsonLines()


def _read_cells(text: str) -> list[str]:
    return next(csv.reader(io.StringIO(text.lstrip("\r\n"), newline="")))


def _members(line: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text as it stands there) of each member of a JSON object that can be read."""
    decode = json.JSONDecoder().raw_decode
    position = _skip_space(line, line.index("{") + 1)
    while line[position] != "}":
        start = position
        name, position = scanstring(line, position + 1)
        position = _skip_space(line, _skip_space(line, position) + 1)
        _, position = decode(line, position)
        yield name, line[start:position]
        position = _skip_space(line, position)
        if line[position] == ",":
            position = _skip_space(line, position + 1)


def _skip_space(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position


def _dump_member(name: str, value: Any) -> str:
    text = f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{json.dumps(name)}: {json.dumps(value)}"
    return text


def _last_index(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def _write_cells(cells: list[str], end: str) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end).writerow(cells)
    return file.getvalue()


def _to_cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)

"""Writes all captions to one file. A kill loses none of them, and none that somebody else writes there."""

import csv
import errno
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from caption_train.captioning.outputs import Caption, Sink
from caption_train.captioning.sinks.existing import KEEP, Added, AddedLog, Existing
from caption_train.captioning.sinks.merging import RowMerge
from caption_train.captioning.sinks.row_text import REPLACED, Row, Table, TextRow, make_table
from caption_train.captioning.storage.image_list import find_odd, folders_of
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.captioning.storage.shard import Shard
from caption_train.data.formats import TEXT_COLUMNS
from caption_train.data.text import refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, print_line
from caption_train.system.exclusive import Signature, create_atomically, replace_unchanged
from caption_train.system.files import (
    behind_link,
    clear_temporary,
    find_matching,
    open_own,
    opening_regular_file,
    parse_json,
)
from caption_train.system.lock import OutputLock

REPLACES = "replaces"
"""A journal's own column: the captions that are replaced, or each with what becomes of it where a run adds to
them. Others are somebody else's, and stay."""
_MOST_BYTES = 4 << 30
_MOST_TRIES = 100


class CaptionFile(Sink):
    """All captions in one `.jsonl` or `.csv` file, a row an image; `metadata.jsonl` is a dataset's own.

    New rows go at once to a journal beside the file, one journal per process. `finish` writes the file from
    its old rows and the journals. The next run reads the journals that a killed run has left.

    Args:
        path: the file.
        rank: the rank of this process, which names its journal.
        existing: what becomes of the captions that are there when the run begins.
        column: of the captions; where it is not `text`, rows have several captions of different prompts.
        locks: whether to lock the file; not for the second of several columns of one run.
        shard: the part of the images that this job captions: then its rows go to a file of their own, and
            captions in `path` are seen but not touched.
    """

    def __init__(
        self,
        path: Path,
        rank: int = 0,
        *,
        existing: Existing = KEEP,
        column: str = "text",
        locks: bool = True,
        shard: Shard | None = None,
    ) -> None:
        self.is_dataset = path.name == "metadata.jsonl"
        self._whole, path = path, shard.path_of(path) if shard else path
        self.path = path
        self._existing = existing
        self._column = column
        self._holds_lock = locks
        name = path.name if column == "text" else f"{path.name}.{column}"
        self._log = AddedLog(path.parent, name, rank, f"--output {path}")
        self._journal_pattern = re.compile(rf"\.{re.escape(name)}\.\d+\.part", re.DOTALL)
        self._added: DiskDict[tuple] = DiskDict()
        self._folder = path.parent.resolve()
        self._journal_path = path.with_name(f".{name}.{rank}.part")
        self._journal: io.FileIO | None = None
        self._lock = OutputLock(
            path.parent, f".{path.name}.lock", f"--output {path}", instead="choose another file"
        )
        self._prefixes: dict[str, str] = {}
        self._captions: DiskDict[str | None] = DiskDict()
        self._before: DiskDict[list[str]] = DiskDict()
        self._theirs: DiskDict[str] = DiskDict()
        self._seen: Signature | None = None

    def open(self, images: Sequence[Path]) -> None:
        """Lock the file, and find the captions in it and in the journals of killed runs.

        Raises:
            UsageError: the file cannot be written or continued.
            CaptionTrainError: another run is writing to it.
        """
        folder = self.path.parent
        if not folder.is_dir():
            raise UsageError(f"--output {self.path}: there is no folder {folder}")
        if self.path.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--output {self.path}: cannot be written there")
        if self.path.is_symlink() and not self.path.exists():
            raise UsageError(f"--output {self.path}: is a link to nothing: delete it, or name another file")
        for image in [*(folder / "_" for folder in folders_of(images)), *find_odd(images)]:
            self.name_of(image)
        if self._holds_lock:
            self.lock()
        clear_temporary(folder)
        if self._existing.replaces:
            self.take_over()
            if self._existing.adds:
                self.begin(images)
                self._added = self._log.read(self._existing.run)
                self.was_complete = self._log.is_complete
            else:
                self._log.discard()
            return
        if any(isinstance(row.get(REPLACES), dict) for row in self._read_journals()):
            self.take_over()  # What a run adds is a part of a caption: the file has to say which.
        self._captions = self._load()

    def find_lacking(self, images: Sequence[Path]) -> list[Path]:
        """Return those of these images that have no caption here, or are captioned again."""
        if self._existing.adds:
            return self._resume(images)
        if self._existing.replaces:
            return list(images)
        return [image for image in images if self._captions.get(self.name_of(image)) is None]

    def begin(self, images: Sequence[Path]) -> None:
        """Remember the captions that are there, to notice those that somebody else writes from now on."""
        self._seen = Signature.of(behind_link(self.path))
        self._before = DiskDict()
        for row in self.read_rows():
            if (text := self._text_of(row.values)) is not None:
                name = row.values["file_name"]
                self._before[name] = [*self._before.get(name, ()), text]

    def read(self, image: Path) -> str:
        """Return the caption in an image's row; of a run that adds, what it has added."""
        if self._existing.adds:
            return self._added[self.name_of(image)][1]
        return self._captions[self.name_of(image)]

    def write(self, caption: Caption) -> Caption:
        """Write one caption to the journal."""
        name = self.name_of(caption.image)
        row = {"file_name": name, self._column: caption.text}
        if not self.is_dataset and self._column == "text":
            more = {"answer": caption.answer, "remarks": list(caption.remarks)}
            row |= {name: value for name, value in more.items() if value}
        before = self._before.get(name, [])
        if self._existing.adds:
            self._log.note(self._existing.run, name, Added(tuple(before), caption.text))
            joined = {old: self._existing.join(old, caption.text) for old in before}
            # A row that holds this addition already would get it twice if rows were merged twice.
            row[REPLACES] = {old: new for old, new in joined.items() if old not in joined.values()}
        elif self._existing.replaces and before:
            row[REPLACES] = before
        self._append((json.dumps(row) + "\n").encode())
        return caption

    def find_theirs(self, caption: Caption) -> Caption | None:
        """Return the caption that somebody else has put into the image's row since the run began."""
        now = Signature.of(behind_link(self.path))
        if now != self._seen:
            theirs: DiskDict[str] = DiskDict()
            try:
                for row in self.read_rows():
                    name, text = row.values["file_name"], self._text_of(row.values)
                    if _is_text(text) and text not in self._before.get(name, ()):
                        theirs[name] = text
            except UsageError:
                return None  # Perhaps half of it is saved at this moment; `finish` reads it again.
            self._seen, self._theirs = now, theirs
        text = self._theirs.get(self.name_of(caption.image))
        return None if text is None else replace(caption, text=text, answer=None, remarks=())

    def finish(self, images: Sequence[Path] = (), *, complete: bool = True) -> list[str]:
        """Write the file: rows of other images unchanged, then those of `images` in their order.

        An image may have several rows; its new caption goes to all that have none, or one to be replaced.
        """
        try:
            kept = self._merge(images)
        except OSError as error:
            raise CaptionTrainError(f"--output {self.path}: {error.strerror or error}") from error
        if complete:
            self._discard_journals()
        return kept

    def mark_added(self) -> None:
        """Write into the log that the run is done."""
        self._log.mark_done(self._existing.run)

    def forget_added(self) -> None:
        """Delete the log."""
        self._log.discard()

    def close(self) -> None:
        """Allow other runs to write to the file."""
        self._log.close()
        self._lock.release()

    def captions(self) -> dict[str, str]:
        """Return the captions that exist by `file_name`: the file's, then those that killed runs left."""
        return {name: text for name, text in self._load().items() if text is not None}

    def name_of(self, image: Path) -> str:
        """Return what `file_name` says: relative to the file's folder for images in it, else absolute."""
        # As text: paths are compared part by part, and this is asked four times an image.
        folder, name = os.path.split(str(image))
        if folder not in self._prefixes:
            self._prefixes[folder] = self._prefix_of(image.parent)
        name = self._prefixes[folder] + name
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--output {self.path}: {escape_unprintable(image)} has a name that is not UTF-8, which no "
                "row can hold: rename it, or use --save_captions"
            ) from None
        return name

    def lock(self) -> None:
        """Lock the file; CaptionTrainError where another run writes to it."""
        try:
            line = self._lock.acquire()
        except OSError as error:
            raise CaptionTrainError(f"--output {self.path}: {error.strerror or error}") from error
        if line:
            print_line(line)

    def _append(self, line: bytes) -> None:
        try:
            if self._journal is None:
                descriptor = open_own(self._journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                # Unbuffered: data that could not be written would raise again when the file is closed.
                self._journal = open(descriptor, "ab", buffering=0)  # noqa: PTH123, SIM115
                line = b"\n" + line  # A killed process may have left half a line.
            if self._journal.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CaptionTrainError(
                f"--output {self.path}: {self._journal_path} cannot be written: {error.strerror or error}"
            ) from error

    def write_merged(self, merge: RowMerge, change: Callable[[Table], Iterable[tuple[int, TextRow]]]) -> None:
        """Write the file from its old rows and new ones, whatever is written there meanwhile.

        Args:
            merge: the new rows.
            change: yields (number, new content) of the rows of the file that change; called again where
                somebody else has written the file at this moment.
        """
        target = behind_link(self.path)
        for _ in range(_MOST_TRIES):
            was = Signature.of(target)
            table = self._read_table(merge)
            merge.change(change(table))
            merge.append(table.make(_without_marks(new)) for new in merge.find_unmet())

            def write(file: IO[bytes], table: Table = table) -> None:
                for text in table.render_rows(merge.in_order()):
                    file.write(text.encode())

            if create_atomically(target, write) if was is None else replace_unchanged(target, write, was):
                return
        raise CaptionTrainError(
            f"--output {self.path}: something else writes it all the time; the captions wait in "
            f"{self._journal_path} for the next run"
        )

    def _merge(self, images: Sequence[Path]) -> list[str]:
        merge = RowMerge(map(self.name_of, images))
        merge.add_new(self._read_journals())
        if not merge.has_new and Signature.of(behind_link(self.path)) is not None:
            return []
        kept: dict[str, None] = {}

        def change(table: Table) -> Iterator[tuple[int, TextRow]]:
            kept.clear()
            return self._change_rows(table, merge, kept)

        self.write_merged(merge, change)
        places = [(merge.place_of(name), name) for name in kept]
        return [str(images[place]) if place >= 0 else name for place, name in places]

    def take_over(self) -> None:
        """Merge what runs that were cut short have left, and remove their journals."""
        if self._journals():
            self.finish()

    def _resume(self, images: Sequence[Path]) -> list[Path]:
        """Return the images that nothing was added to; complete what was only noted down."""
        lacking = []
        for image in images:
            name = self.name_of(image)
            added = self._added.get(name)
            if added is None:
                lacking.append(image)
            elif list(added[0]) == self._before.get(name, []):
                self.write(Caption(image, added[1]))
        return lacking

    def _discard_journals(self) -> None:
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
        return find_matching(self.path.parent, ".", self._journal_pattern)

    def _read_journals(self) -> Iterator[Row]:
        for journal in self._journals():
            try:
                with opening_regular_file(journal, _MOST_BYTES, is_own=True) as file:
                    yield from filter(None, map(_parse_row, file))
            except (OSError, ValueError) as error:
                raise CaptionTrainError(
                    f"--output {self.path}: {journal}: {getattr(error, 'strerror', None) or error}, where a "
                    "killed run's captions would be; move it away"
                ) from error

    def _load(self) -> DiskDict[str | None]:
        """Return the captions of all rows by their names, None where a row has none."""
        found: DiskDict[str | None] = DiskDict()
        for values in itertools.chain((row.values for row in self.read_rows()), self._read_journals()):
            found[values["file_name"]] = self._text_of(values)
        if self._whole != self.path:
            for row in self.read_rows(self._whole):
                if found.get(row.values["file_name"]) is None:
                    found[row.values["file_name"]] = self._text_of(row.values)
        return found

    def read_rows(self, path: Path | None = None, table: Table | None = None) -> Iterator[TextRow]:
        """Yield the rows of the file, or of that at `path`; none where there is no such file.

        Raises:
            UsageError: it cannot be read.
        """
        path = path or self.path
        table = table or make_table(path)
        try:
            for number, row in enumerate(table.open(path, _MOST_BYTES), 1):
                if not isinstance(row.values, dict) or not isinstance(row.values.get("file_name"), str):
                    raise UsageError(
                        f"--output {path}: row {number} of that file has no file_name: name another file"
                    )
                yield row
        except FileNotFoundError:
            return
        except (OSError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--output {path}: the file there cannot be continued: {reason}") from error

    def _read_table(self, merge: RowMerge) -> Table:
        """Take in the rows of the file, and return what it is made of beside them."""
        table = make_table(self.path)
        merge.read(self.read_rows(table=table))
        return table

    def _change_rows(
        self, table: Table, merge: RowMerge, kept: dict[str, None]
    ) -> Iterator[tuple[int, TextRow]]:
        column = self._column
        replaceable = REPLACED if column == "text" else (column,)
        for number, content, new in merge.find_met():
            row, caption = table.parse(content), _without_marks(new)
            text, replaced = self._text_of(row.values), new.get(REPLACES, ())
            joined = replaced if isinstance(replaced, dict) else {}
            if text is None or text in replaced:
                caption |= {column: joined[text]} if text in joined else {}
                table.change(row, caption, replaceable)
                yield number, row
            elif text not in (caption.get(column), *joined.values()):
                kept[new["file_name"]] = None

    def _text_of(self, row: Row) -> str | None:
        return find_caption(row, self._column, self.path)


def find_caption(row: Row, column: str, path: Path) -> str | None:
    """Return the caption in a row of a file, None where it has none.

    column: of the captions; `text` may be called `caption`.
    """
    if column == "text":
        return next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
    text = row.get(column)
    # A table has an empty cell where there is no caption yet.
    return text if isinstance(text, str) and (text or path.suffix != ".csv") else None


def _parse_row(line: bytes) -> Row | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None  # The last line of a killed process, cut within a character perhaps.
    return row if isinstance(row, dict) and isinstance(row.get("file_name"), str) else None


def _without_marks(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != REPLACES}


def _is_text(text: str | None) -> bool:
    """Tell whether a row has a caption that a caption file can hold too."""
    try:
        refuse_odd_characters(text or "")
    except ValueError:
        return False
    return text is not None

"""Writes all captions to one file. A kill loses none of them, and none that somebody else writes there."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from caption_train.captioning.outputs import Caption, Sink
from caption_train.captioning.sinks.existing import KEEP, Added, AddedLog, Existing
from caption_train.captioning.sinks.merging import RowMerge
from caption_train.captioning.sinks.row_file import (
    MOST_BYTES,
    REPLACES,
    RowFile,
    find_caption,
    is_row,
    without_marks,
)
from caption_train.captioning.sinks.row_text import REPLACED, Row, Table, TextRow
from caption_train.captioning.storage.image_list import find_odd, folders_of
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.captioning.storage.shard import Shard
from caption_train.data.formats import METADATA_NAME
from caption_train.data.text import refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import print_line
from caption_train.system.exclusive import Signature
from caption_train.system.files import (
    AppendedRows,
    clear_temporary,
    find_matching,
    opening_regular_file,
    parse_rows,
)
from caption_train.system.lock import OutputLock


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
        self._whole = RowFile(path) if shard else None
        is_dataset = path.name == METADATA_NAME
        path = shard.path_of(path) if shard else path
        self.path, self.rows = path, RowFile(path, is_dataset=is_dataset)
        self._existing = existing
        self._column = column
        self._holds_lock = locks
        name = path.name if column == "text" else f"{path.name}.{column}"
        self._log = AddedLog(path.parent, name, rank, f"--output {path}")
        self._journal_pattern = re.compile(rf"\.{re.escape(name)}\.\d+\.part", re.DOTALL)
        self._added: DiskDict[tuple] = DiskDict()
        self._journal = AppendedRows(path.with_name(f".{name}.{rank}.part"))
        self._lock = OutputLock(
            path.parent, f".{path.name}.lock", f"--output {path}", instead="choose another file"
        )
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
            self.rows.name_of(image)
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
        return [image for image in images if self._captions.get(self.rows.name_of(image)) is None]

    def begin(self, images: Sequence[Path]) -> None:
        """Remember the captions that are there, to notice those that somebody else writes from now on."""
        self._seen = self.rows.sign()
        self._before = DiskDict()
        for row in self.rows.read():
            if (text := self._text_of(row.values)) is not None:
                name = row.values["file_name"]
                self._before[name] = [*self._before.get(name, ()), text]

    def read(self, image: Path) -> str:
        """Return the caption in an image's row; of a run that adds, what it has added."""
        if self._existing.adds:
            return self._added[self.rows.name_of(image)][1]
        return self._captions[self.rows.name_of(image)]

    def write(self, caption: Caption) -> Caption:
        """Write one caption to the journal."""
        name = self.rows.name_of(caption.image)
        row = {"file_name": name, self._column: caption.text}
        if not self.rows.is_dataset and self._column == "text":
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
        self._append(row)
        return caption

    def find_theirs(self, caption: Caption) -> Caption | None:
        """Return the caption that somebody else has put into the image's row since the run began."""
        now = self.rows.sign()
        if now != self._seen:
            theirs: DiskDict[str] = DiskDict()
            try:
                for row in self.rows.read():
                    name, text = row.values["file_name"], self._text_of(row.values)
                    if _is_text(text) and text not in self._before.get(name, ()):
                        theirs[name] = text
            except UsageError:
                return None  # Perhaps half of it is saved at this moment; `finish` reads it again.
            self._seen, self._theirs = now, theirs
        text = self._theirs.get(self.rows.name_of(caption.image))
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

    def lock(self) -> None:
        """Lock the file; CaptionTrainError where another run writes to it."""
        try:
            line = self._lock.acquire()
        except OSError as error:
            raise CaptionTrainError(f"--output {self.path}: {error.strerror or error}") from error
        if line:
            print_line(line)

    def _append(self, row: Row) -> None:
        try:
            self._journal.append(row)
        except OSError as error:
            raise CaptionTrainError(
                f"--output {self.path}: {self._journal.path} cannot be written: {error.strerror or error}"
            ) from error

    def _merge(self, images: Sequence[Path]) -> list[str]:
        merge = RowMerge(map(self.rows.name_of, images))
        merge.add_new(self._read_journals())
        if not merge.has_new and self.rows.sign() is not None:
            return []
        kept: dict[str, None] = {}

        def change(table: Table) -> Iterator[tuple[int, TextRow]]:
            kept.clear()
            return self._change_rows(table, merge, kept)

        self.rows.write(merge, change)
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
            name = self.rows.name_of(image)
            added = self._added.get(name)
            if added is None:
                lacking.append(image)
            elif list(added[0]) == self._before.get(name, []):
                self.write(Caption(image, added[1]))
        return lacking

    def _discard_journals(self) -> None:
        self._journal.close()
        for journal in self._journals():
            journal.unlink(missing_ok=True)

    def _journals(self) -> list[Path]:
        return find_matching(self.path.parent, ".", self._journal_pattern)

    def _read_journals(self) -> Iterator[Row]:
        for journal in self._journals():
            try:
                with opening_regular_file(journal, MOST_BYTES, is_own=True) as file:
                    yield from filter(is_row, parse_rows(file))
            except (OSError, ValueError) as error:
                raise CaptionTrainError(
                    f"--output {self.path}: {journal}: {getattr(error, 'strerror', None) or error}, where a "
                    "killed run's captions would be; move it away"
                ) from error

    def _load(self) -> DiskDict[str | None]:
        """Return the captions of all rows by their names, None where a row has none."""
        found: DiskDict[str | None] = DiskDict()
        for values in itertools.chain((row.values for row in self.rows.read()), self._read_journals()):
            found[values["file_name"]] = self._text_of(values)
        if self._whole:
            for row in self._whole.read():
                if found.get(row.values["file_name"]) is None:
                    found[row.values["file_name"]] = self._text_of(row.values)
        return found

    def _change_rows(
        self, table: Table, merge: RowMerge, kept: dict[str, None]
    ) -> Iterator[tuple[int, TextRow]]:
        column = self._column
        replaceable = REPLACED if column == "text" else (column,)
        for number, content, new in merge.find_met():
            row, caption = table.parse(content), without_marks(new)
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


def _is_text(text: str | None) -> bool:
    """Tell whether a row has a caption that a caption file can hold too."""
    try:
        refuse_odd_characters(text or "")
    except ValueError:
        return False
    return text is not None

"""A file of rows, each with an image's `file_name`: read and written whatever else writes it meanwhile."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from caption_train.captioning.sinks.merging import RowMerge
from caption_train.captioning.sinks.row_text import Row, Table, TextRow, make_table
from caption_train.data.formats import METADATA_NAME, TEXT_COLUMNS
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.exclusive import Signature, create_atomically, replace_unchanged
from caption_train.system.files import behind_link

REPLACES = "replaces"
"""A journal's own column: the captions that are replaced, or each with what becomes of it where a run adds to
them. Others are somebody else's, and stay."""
MOST_BYTES = 4 << 30
_MOST_TRIES = 100


class RowFile:
    """A `.jsonl` or `.csv` file of captions.

    Args:
        path: the file, which need not be there.
        is_dataset: whether it is a dataset's own or a part of it; if not given, `metadata.jsonl` is.
    """

    def __init__(self, path: Path, *, is_dataset: bool | None = None) -> None:
        self.path = path
        self.is_dataset = path.name == METADATA_NAME if is_dataset is None else is_dataset
        self._folder = path.parent.resolve()
        self._prefixes: dict[str, str] = {}

    def sign(self) -> Signature | None:
        """Return the signature of the file, or of the one that a link leads to; None where there is none."""
        return Signature.of(behind_link(self.path))

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

    def read(self, table: Table | None = None) -> Iterator[TextRow]:
        """Yield the rows; none where there is no such file.

        Raises:
            UsageError: it cannot be read.
        """
        path, table = self.path, table or make_table(self.path)
        try:
            for number, row in enumerate(table.open(path, MOST_BYTES), 1):
                if not is_row(row.values):
                    raise UsageError(
                        f"--output {path}: row {number} of that file has no file_name: name another file"
                    )
                yield row
        except FileNotFoundError:
            return
        except (OSError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--output {path}: the file there cannot be continued: {reason}") from error

    def write(self, merge: RowMerge, change: Callable[[Table], Iterable[tuple[int, TextRow]]]) -> None:
        """Write the file from its old rows and new ones, whatever is written there meanwhile.

        Args:
            merge: the new rows.
            change: yields (number, new content) of the rows of the file that change; called again where
                somebody else has written the file at this moment.

        Raises:
            CaptionTrainError: something else writes it all the time.
            OSError: it cannot be written.
        """
        target = behind_link(self.path)
        for _ in range(_MOST_TRIES):
            was = Signature.of(target)
            table = self._read_table(merge)
            merge.change(change(table))
            merge.append(table.make(without_marks(new)) for new in merge.find_unmet())

            def write(file: IO[bytes], table: Table = table) -> None:
                for text in table.render_rows(merge.in_order()):
                    file.write(text.encode())

            if create_atomically(target, write) if was is None else replace_unchanged(target, write, was):
                return
        raise CaptionTrainError(
            f"--output {self.path}: something else writes it all the time; no caption is lost: run this again"
        )

    def _read_table(self, merge: RowMerge) -> Table:
        """Take in the rows of the file, and return what it is made of beside them."""
        table = make_table(self.path)
        merge.read(self.read(table))
        return table

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


def find_caption(row: Row, column: str, path: Path) -> str | None:
    """Return the caption in a row of a file, None where it has none.

    column: of the captions; `text` may be called `caption`.
    """
    if column == "text":
        return next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
    text = row.get(column)
    # A table has an empty cell where there is no caption yet.
    return text if isinstance(text, str) and (text or path.suffix != ".csv") else None


def is_row(row: Any) -> bool:
    """Tell whether a value is a row of an image."""
    return isinstance(row, dict) and isinstance(row.get("file_name"), str)


def without_marks(row: Row) -> Row:
    """Return a row of a journal as a row of the file."""
    return {key: value for key, value in row.items() if key != REPLACES}

"""What every kind of shard is made of: records, each an image with what is said of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from caption_train.errors import CaptionTrainError
from caption_train.packed import PackedFile
from caption_train.system.console import escape_unprintable


class ShardError(CaptionTrainError):
    """A shard that cannot be read; the message is one line that begins with its name."""


@dataclass(slots=True)
class Held:
    """A caption that is there, or that could be.

    Attributes:
        text: what is there, on one line; None if nothing is there, or only blanks.
        problem: what is wrong with it, in one line that begins with its name; it is there, and nobody can
            read it.
    """

    text: str | None = None
    problem: str | None = None

    def __bool__(self) -> bool:
        """Whether there is a caption, be it one that cannot be read."""
        return self.text is not None or self.problem is not None


@dataclass(slots=True)
class Record:
    """One image of a shard.

    Attributes:
        index: its number among the shard's images, from 0.
        key: what names it in the shard, such as `00017/000170042`.
        image: the image, in the shard or a file of its own; None where there is none that can be read.
        problem: what is wrong with it, in one line that begins with its name.
        captions: one for each of the reader's `columns`.
        load_fields: returns what else the shard says of it.
    """

    index: int
    key: str
    image: Path | None
    problem: str | None = None
    captions: list[Held] = field(default_factory=lambda: [Held()])
    load_fields: Callable[[], Mapping[str, Any]] = dict

    @property
    def caption(self) -> str | None:
        """The text of the first caption, the only one but with `--prompts`."""
        return self.captions[0].text

    @property
    def file_name(self) -> str:
        """What rows of captions call the image: its name in the shard, or the path of a file of its own."""
        return self.image.name if isinstance(self.image, PackedFile) else str(self.image or "")


@dataclass
class Notes:
    """What was found in a shard beside its records; it is complete when all records were read.

    Attributes:
        problems: damage of the shard, one line each: what comes after it is lost.
        without_image: keys of what has no image; the first few.
        without_image_count: how many there are.
        doubles: names that are there twice; the first few.
        doubles_count: how many there are.
    """

    problems: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    without_image_count: int = 0
    doubles: list[str] = field(default_factory=list)
    doubles_count: int = 0

    def note_without_image(self, key: str) -> None:
        """Count something that has no image."""
        self.without_image_count += 1
        if len(self.without_image) < MOST_NAMES:
            self.without_image.append(key)

    def note_double(self, name: str) -> None:
        """Count a name that was there before."""
        self.doubles_count += 1
        if len(self.doubles) < MOST_NAMES:
            self.doubles.append(name)

    def lines(self, shard: str) -> list[str]:
        """Return a line for each kind of thing that is odd but harms nothing."""
        found = (
            (self.without_image_count, "without an image", self.without_image),
            (self.doubles_count, "of a name that is there before", self.doubles),
        )
        return [
            f"{escape_unprintable(shard)}: {count:,} {what}: {_list_names(names, count)}"
            for count, what, names in found
            if count
        ]


MOST_NAMES = 3
ONE_CAPTION = ("text",)


def _list_names(names: Sequence[str], count: int) -> str:
    rest = f" and {count - len(names):,} more" if count > len(names) else ""
    return ", ".join(map(escape_unprintable, names)) + rest


@dataclass(slots=True)
class NewCaption:
    """A caption that was made for a record.

    Attributes:
        index: its number among the captions of the shard, those of a record one after the other: the
            record's number where each has one.
        text: the caption; None where the image could not be captioned.
        error: why not, in one line that begins with the image's name.
        remarks: keys of REMARKS.
        answer: boxes or polygons, if any.
    """

    index: int
    text: str | None
    error: str | None = None
    remarks: Sequence[str] = ()
    answer: Any = None


class ShardReader(ABC):
    """Reads one shard, in order, a part at a time.

    Args:
        path: the file, on this machine.
        name: what messages call it, such as its URL; the path if not given.
        caption_extensions: endings of caption files inside, or names of caption columns; earlier ones win.
        names: of the captions of an image that are made, as in `--prompts`; `text` is that of a run without.

    Attributes:
        columns: `names`, and `text` if it is none of them: it is read all the same.

    Raises:
        ShardError: the file is none that can be read.
    """

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        caption_extensions: Sequence[str] = (),
        names: Sequence[str] = ONE_CAPTION,
    ) -> None:
        self.path = path
        self.name = name or str(path)
        self.extensions = caption_extensions
        self.names = names
        self.columns = list(dict.fromkeys((*names, "text")))
        self.notes = Notes()

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield the records. What is wrong with one is in it; damage that ends the shard early is in `notes`.

        Raises:
            ShardError: the file cannot be read, or not to its end.
        """

    @abstractmethod
    def write(self, target: IO[bytes], captions: Iterator[NewCaption], extension: str) -> None:
        """Write a copy of the shard that has new captions; everything else stays as it is.

        Args:
            target: the file to write, open in binary.
            captions: in the order of the records; what gets none stays as it is.
            extension: of new caption files inside, after the name of the caption if it is not `text`.
        """

    def check_target(self) -> None:  # noqa: B027  (most can hold any)
        """Raise ShardError where a copy of the shard cannot hold the captions."""

    def name_member(self, name: str) -> str:
        """Return what messages call something in the shard."""
        return f"{escape_unprintable(self.name)}/{escape_unprintable(name)}"


class Merged:
    """Gives out new captions by the numbers of their records, which must be asked for in rising order.

    Args:
        captions: in the order of the records; those that could not be made are passed over.
        each: captions of a record.
    """

    def __init__(self, captions: Iterator[NewCaption], each: int) -> None:
        self._captions, self._each = captions, each
        self._next = next(captions, None)

    def take(self, index: int) -> dict[int, NewCaption]:
        """Return the captions of a record by their place among its captions."""
        first, found = index * self._each, {}
        while (caption := self._next) is not None and caption.index < first + self._each:
            if caption.index >= first and caption.text is not None:
                found[caption.index - first] = caption
            self._next = next(self._captions, None)
        return found

"""What a run over shards keeps of each shard that it works on, and counts of all."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field

from caption_train.captioning.storage.names import FirstLines
from caption_train.shards.journal import Done, Journal
from caption_train.shards.places import Shard
from caption_train.shards.records import ShardReader
from caption_train.system.lock import OutputLock


@dataclass
class Counts:
    """What became of shards and of their images; two of them can be added.

    Attributes:
        shards: written by this run.
        before: that were done before.
        busy: that other runs work on.
        kept: captions that were there, or come from a run that was cut short.
        problems: one line for each image or shard that cannot be read, or has changed; the first thousand.
        other: shards that were done with other settings.
        limited: whether `--limit` ended the run.
        own: images that were asked what their row says.
    """

    shards: int = 0
    before: int = 0
    busy: int = 0
    kept: int = 0
    problems: FirstLines = field(default_factory=FirstLines)
    other: int = 0
    limited: bool = False
    own: int = 0

    def __add__(self, more: Counts) -> Counts:
        """Return the counts of two processes."""
        return Counts(
            *(getattr(self, name) + getattr(more, name) for name in ("shards", "before", "busy", "kept")),
            self.problems + more.problems,
            self.other + more.other,
            self.limited or more.limited,
            self.own + more.own,
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """A caption that was asked for.

    Attributes:
        number: its number among the captions of the shard.
        old: the caption that is there; "" where there is none.
        prompt: what is asked.
    """

    number: int
    old: str
    prompt: str


@dataclass
class Judged:
    """What becomes of the captions of a record.

    Attributes:
        asked: those to ask for.
        kept: how many stay as they are.
        problems: a line for each that cannot be made.
    """

    asked: list[Asked] = field(default_factory=list)
    kept: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Unit:
    """A shard in work.

    Attributes:
        shard, reader, journal, lock: of the shard.
        waiting: the captions that have no result yet.
        done: what will be remembered of it.
        resumed: the number of the last caption that an earlier run has a result of.
        last_problem: what was last noted: the number of the image, and the line.
        is_read: whether all its records were seen, or as many as can be read.
        is_lost: whether it cannot be read to its end, so that nothing is written.
    """

    shard: Shard
    reader: ShardReader
    journal: Journal
    lock: OutputLock
    done: Done
    open_files: ExitStack
    waiting: deque[Asked] = field(default_factory=deque)
    resumed: int = -1
    last_problem: tuple[int, str] | None = None
    is_read: bool = False
    is_lost: bool = False

    def close(self) -> None:
        """Let other runs at the shard."""
        self.journal.close()
        self.lock.release()
        self.open_files.close()

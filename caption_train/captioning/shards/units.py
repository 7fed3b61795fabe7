"""What a run over shards keeps of each shard that it works on, and counts of all."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field

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
        kept: images that had a caption, or got one from a run that was cut short.
        problems: one line for each image or shard that cannot be read, or has changed.
        other: shards that were done with other settings.
        limited: whether `--limit` ended the run.
    """

    shards: int = 0
    before: int = 0
    busy: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)
    other: int = 0
    limited: bool = False

    def __add__(self, more: Counts) -> Counts:
        """Return the counts of two processes."""
        return Counts(
            *(getattr(self, name) + getattr(more, name) for name in ("shards", "before", "busy", "kept")),
            self.problems + more.problems,
            self.other + more.other,
            self.limited or more.limited,
        )


@dataclass
class Unit:
    """A shard in work.

    Attributes:
        shard, reader, journal, lock: of the shard.
        waiting: the records that have no result yet, with the captions that they had.
        done: what will be remembered of it.
        resumed: the number of the last record that an earlier run has a result of.
        is_read: whether all its records were seen, or as many as can be read.
        is_lost: whether it cannot be read to its end, so that nothing is written.
    """

    shard: Shard
    reader: ShardReader
    journal: Journal
    lock: OutputLock
    done: Done
    open_files: ExitStack
    waiting: deque[tuple[int, str]] = field(default_factory=deque)
    resumed: int = -1
    is_read: bool = False
    is_lost: bool = False

    def close(self) -> None:
        """Let other runs at the shard."""
        self.journal.close()
        self.lock.release()
        self.open_files.close()

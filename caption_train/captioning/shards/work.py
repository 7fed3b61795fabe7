"""Goes through shards, asks for captions of their images, and writes each shard when it has them all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from caption_train.captioning.prompts import Task, read_named_prompts
from caption_train.captioning.shards.prompts import ShardPrompts
from caption_train.captioning.shards.units import Asked, Counts, Judged, Unit
from caption_train.captioning.sinks.existing import Existing
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError
from caption_train.shards.copies import Copies
from caption_train.shards.formats import is_copied, write_shard
from caption_train.shards.journal import Done
from caption_train.shards.output import OutputFolder
from caption_train.shards.places import Shard, open_shard
from caption_train.shards.records import ONE_CAPTION, NewCaption, Record, ShardError
from caption_train.system.console import count_things, escape_unprintable, print_line


class ShardWork:
    """The shards of one process.

    Args:
        options: the flags of the run.
        output: where shards go to.
        prompts: says what is asked.
    """

    def __init__(self, options: CaptionOptions, output: OutputFolder, prompts: ShardPrompts) -> None:
        self._options, self._output, self._prompts = options, output, prompts
        self._existing = Existing.from_options(options)
        self._names = tuple(read_named_prompts(options.prompts)) or ONE_CAPTION
        self._units: deque[Unit] = deque()
        self._asked = 0
        self.counts = Counts()

    def ask(self, shards: Sequence[Shard]) -> Iterator[Task]:
        """Yield what is to be captioned, in order; `take` wants the results in the same order."""
        copies = Copies(shards)
        try:
            for shard in shards:
                unit = self._begin(shard, copies)
                if unit is None:
                    copies.drop(shard)
                else:
                    copies.fetch_next(shard)
                    yield from self._ask_unit(unit)
                if self.counts.limited:
                    return
        finally:
            copies.close()

    @property
    def next_prompt(self) -> str:
        """What was asked where `take` wants the result of."""
        return next(unit.waiting[0].prompt for unit in self._units if unit.waiting)

    def take(self, result: NewCaption) -> None:
        """Write down the result of the next caption that was asked for; its number need not be set."""
        unit = next(unit for unit in self._units if unit.waiting)
        asked = unit.waiting.popleft()
        result.index = asked.number
        if result.text is None:
            self._note_failed(unit, result)
        else:
            result.text = self._existing.join(asked.old, result.text)
            unit.done.captioned += 1
        unit.journal.add(result)
        self.finish_ready()

    def finish_ready(self) -> None:
        """Write the shards whose images all have their results."""
        while self._units and self._units[0].is_read and not self._units[0].waiting:
            unit = self._units.popleft()
            try:
                if not unit.is_lost:
                    self._finish(unit)
            finally:
                unit.close()

    def close(self) -> None:
        """Leave the shards that are not finished to another run."""
        while self._units:
            self._units.popleft().close()

    def _begin(self, shard: Shard, copies: Copies) -> Unit | None:
        """Lock and open a shard; None where there is nothing to do."""
        output, lock = self._output, self._output.lock(shard)
        if self._is_done(shard):
            return None
        try:
            if line := lock.acquire():
                print_line(line)
        except OSError as error:
            raise CaptionTrainError(f"{output.where}: {error.strerror or error}") from error
        except CaptionTrainError:
            self.counts.busy += 1
            return None
        with ExitStack() as stack, ExitStack() as files:
            stack.callback(lock.release)
            # Another run may have finished it since.
            if self._is_done(shard):
                return None
            journal = output.journal(shard)
            if output.has(shard) and not journal.path.exists():
                name = escape_unprintable(output.name_of(shard))
                self.counts.problems.append(
                    f"{output.where}: {name} is there, and not from this command: move it away"
                )
                return None
            try:
                path = copies.take(shard) if shard.is_remote else None
                if path is not None:
                    files.callback(path.unlink, missing_ok=True)
                reader = open_shard(shard, path, [self._options.caption_extension], self._names)
                if is_copied(reader, output.format_of(shard)):
                    reader.check_target()
            except ShardError as error:
                self.counts.problems.append(str(error))
                return None
            done = Done(shard.stamp, self._existing.run)
            unit = Unit(shard, reader, journal, lock, done, files.pop_all())
            self._resume(unit)
            stack.pop_all()
        self._units.append(unit)
        return unit

    def _is_done(self, shard: Shard) -> bool:
        done = self._output.find_done(shard)
        if done is None:
            return False
        if done.stamp != shard.stamp:
            name = escape_unprintable(self._output.name_of(shard))
            self.counts.problems.append(
                f"{escape_unprintable(shard.place)}: has changed since it was captioned: delete {name} in "
                f"{escape_unprintable(self._output.place)} to caption it again"
            )
        else:
            self.counts.before += 1
            self.counts.other += done.run != self._existing.run
            if done.unreadable:
                name = escape_unprintable(self._output.name_of(shard))
                self.counts.problems.append(
                    f"{escape_unprintable(shard.place)}: {count_things(done.unreadable, 'image')} could not "
                    f"be read when it was captioned: delete {name} in "
                    f"{escape_unprintable(self._output.place)} to try again"
                )
        self._output.journal(shard).discard()
        return True

    def _resume(self, unit: Unit) -> None:
        """Read what a run that was cut short has left."""
        facts = {
            "stamp": unit.shard.stamp,
            "existing": self._existing.mode,
            "extension": self._options.caption_extension,
        }
        if self._existing.mode != "keep":
            # What replaces or adds to a caption is of one model and prompt in all of a shard.
            facts["run"] = self._existing.run
        if self._options.prompts:
            # Captions are numbered in their order.
            facts["names"] = list(self._names)
        if unit.journal.resume(facts):
            print_line(
                f"{escape_unprintable(unit.shard.place)}: what a run that was cut short has left is of "
                "another state of it, or of other flags; it is captioned anew"
            )
        unit.resumed = unit.journal.last
        for caption in unit.journal.read():
            if caption.text is None:
                self._note_failed(unit, caption)
            else:
                unit.done.captioned += 1
                self.counts.kept += 1

    def _ask_unit(self, unit: Unit) -> Iterator[Task]:
        try:
            for record in unit.reader.records():
                judged = self._judge(unit, record)
                if judged.asked and self._options.limit is not None and self._asked >= self._options.limit:
                    self.counts.limited = True
                    return
                unit.done.kept += judged.kept
                self.counts.kept += judged.kept
                # An image counts once, however much was asked of it.
                unit.done.unreadable += bool(judged.problems)
                self.counts.problems += dict.fromkeys(judged.problems)
                if not judged.asked:
                    continue
                self._asked += 1
                unit.waiting.extend(judged.asked)
                for caption in judged.asked:
                    yield Task(record.image, caption.prompt)
        except ShardError as error:
            unit.is_lost = True
            self._note_unreadable(unit, str(error))
        unit.is_read = True
        for line in unit.reader.notes.problems:
            self._note_unreadable(unit, line)
        print_line(*unit.reader.notes.lines(unit.shard.place))
        self.finish_ready()

    def _judge(self, unit: Unit, record: Record) -> Judged:
        """Return what becomes of the captions of a record."""
        judged = Judged()
        if record.problem:
            judged.problems.append(record.problem)
            return judged
        first = record.index * len(self._names)
        for place, held in enumerate(record.captions[: len(self._names)]):
            if held and not self._existing.replaces:
                judged.kept += 1
            elif self._existing.adds and held.problem:
                judged.problems.append(f"{held.problem}; nothing can be added to it")
            else:
                try:
                    prompt = self._prompts.find(unit.shard, unit.reader, record, place)
                except CaptionTrainError as error:
                    judged.problems.append(str(error))
                    continue
                if first + place > unit.resumed:
                    judged.asked.append(Asked(first + place, held.text or "", prompt))
        return judged

    def _note_failed(self, unit: Unit, result: NewCaption) -> None:
        """Note an image that could not be captioned: once, however much was asked of it."""
        problem = result.index // len(self._names), result.error or ""
        if problem != unit.last_problem:
            self._note_unreadable(unit, problem[1])
        unit.last_problem = problem

    def _note_unreadable(self, unit: Unit, line: str) -> None:
        unit.done.unreadable += 1
        self.counts.problems.append(line)

    def _finish(self, unit: Unit) -> None:
        """Write a shard that is complete."""
        unit.journal.close()
        output_format = self._output.format_of(unit.shard)
        extension = self._options.caption_extension

        def write(file: Any) -> None:
            write_shard(unit.reader, file, unit.journal.read(), output_format, extension)

        try:
            self._output.publish(unit.shard, write, unit.done)
        except (ShardError, UnicodeError) as error:
            place = escape_unprintable(unit.shard.place)
            reason = f"{place}: {error}" if isinstance(error, UnicodeError) else str(error)
            self.counts.problems.append(reason)
            return
        unit.journal.discard()
        self.counts.shards += 1

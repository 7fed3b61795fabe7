"""The files that jobs with `--shard` have written beside an `--output`, and the one that they become."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from caption_train.captioning.sinks.caption_file import CaptionFile
from caption_train.captioning.sinks.merging import RowMerge
from caption_train.captioning.sinks.row_file import find_caption
from caption_train.captioning.sinks.row_text import REPLACED, Row, Table, TextRow
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.captioning.storage.names import FirstLines
from caption_train.captioning.storage.shard import Shard
from caption_train.config.merging import MergeOptions
from caption_train.errors import UsageError
from caption_train.system.console import count_things, escape_unprintable, print_line
from caption_train.system.files import find_matching


class ShardFiles:
    """The files of all shards of one output; locked from here on, so that no job writes to them.

    Args:
        options: the flags of merge_captions.py.

    Raises:
        UsageError: there are none, or those of jobs with different N.
        CaptionTrainError: a job is still at work.
    """

    def __init__(self, options: MergeOptions) -> None:
        self._options = options
        self._output = CaptionFile(options.output)
        self._files: dict[Shard, CaptionFile] = {}
        shards = self._find()
        try:
            self._take(self._output)
            for shard in shards:
                self._files[shard] = CaptionFile(options.output, shard=shard)
                self._take(self._files[shard], shard)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let jobs write there again."""
        for file in (self._output, *self._files.values()):
            file.close()

    def merge(self, images: Sequence[Path]) -> Mapping[str, FirstLines]:
        """Write the output, unless an image has captions in two shards.

        Returns:
            What is wrong → the images of which that is true, each in a line.
        """
        captioned: DiskDict[str] = DiskDict()
        repeated, left = FirstLines(), FirstLines()
        merge = RowMerge(map(self._output.rows.name_of, images))
        merge.add_new(self._read_shards(captioned, repeated))
        if repeated:
            return {"with several captions, so nothing is written": repeated}
        for row in self._output.rows.read():
            if self._has_all(row.values, self._output) and row.values["file_name"] not in captioned:
                captioned[row.values["file_name"]] = "none"
        self._output.rows.write(merge, lambda table: self._change_rows(table, merge, left))
        lacking = FirstLines(
            escape_unprintable(image) for image in images if self._output.rows.name_of(image) not in captioned
        )
        count = len(images) - lacking.total
        print_line(
            f"{count:,} of {count_things(len(images), 'image')} captioned in {self._output.path}, "
            f"from {count_things(len(self._files), 'shard')}"
        )
        if left:
            print_line(
                f"{count_things(left.total, 'image')} had another caption there, which stays (--overwrite "
                f"takes that of the shards): {', '.join(left[:5])}{' …' if left.total > 5 else ''}"
            )
        return {"without a caption": lacking} if lacking else {}

    def _take(self, file: CaptionFile, shard: Shard | None = None) -> None:
        """Lock a file, and put what killed jobs have left of all columns into it."""
        file.lock()
        for column in dict.fromkeys(["text", *self._options.columns]):
            CaptionFile(self._options.output, column=column, shard=shard).take_over()

    def _find(self) -> list[Shard]:
        """Return the shards that have files; say which have none."""
        output = self._options.output
        # A job that was killed in its first run has left a journal alone.
        pattern = re.compile(
            rf"\.?{re.escape(output.stem)}\.shard-([0-9]+)-of-([0-9]+){re.escape(output.suffix)}"
            r"((\.\w+)?\.[0-9]+\.part)?",
            re.DOTALL | re.ASCII,
        )
        found = set()
        if output.parent.is_dir():
            for path in find_matching(output.parent, (output.stem, f".{output.stem}"), pattern):
                shard = Shard(*map(int, pattern.fullmatch(path.name).groups()[:2]))
                if 1 <= shard.index <= shard.count and f"{shard.name}{output.suffix}" in path.name:
                    found.add(shard)
        shards = sorted(found, key=lambda shard: shard.index)
        if not shards:
            like = Shard(1, 8).path_of(output)
            raise UsageError(
                f"--output {output}: there are no files of shards beside it, such as {like.name}"
            )
        counts = sorted({shard.count for shard in shards})
        if len(counts) > 1:
            raise UsageError(
                f"--output {output}: there are files of --shard I/{' and I/'.join(map(str, counts))}: move "
                "those that are not meant to another folder"
            )
        there = {shard.index for shard in shards}
        absent = [str(index) for index in range(1, counts[0] + 1) if index not in there]
        if absent:
            shown = ", ".join(absent[:20]) + (" …" if len(absent) > 20 else "")
            print_line(f"{count_things(len(absent), 'shard')} of {counts[0]} without a file: {shown}")
        return shards

    def _read_shards(self, captioned: DiskDict[str], repeated: FirstLines) -> Iterator[Row]:
        """Yield one row for each image that has all its captions, and note its name and shard."""
        for shard, file in self._files.items():
            for row in file.rows.read():
                name = row.values["file_name"]
                if not self._has_all(row.values, file):
                    continue
                if (other := captioned.get(name)) is not None:
                    repeated.append(f"{escape_unprintable(name)}: in shard {other} and in shard {shard}")
                    continue
                captioned[name] = str(shard)
                # A table has empty cells where other rows have something.
                kept = ("file_name", *self._options.columns)
                yield {key: value for key, value in row.values.items() if value != "" or key in kept}

    def _has_all(self, row: Row, file: CaptionFile) -> bool:
        return all(find_caption(row, column, file.path) is not None for column in self._options.columns)

    def _change_rows(self, table: Table, merge: RowMerge, left: FirstLines) -> Iterator[tuple[int, TextRow]]:
        """Yield the rows of the output that get a caption; note those that have all theirs."""
        left.clear()
        for number, content, new in merge.find_met():
            row, taken = table.parse(content), []
            for column in self._options.columns:
                text = find_caption(row.values, column, self._output.path)
                if text is None or (text != new[column] and self._options.overwrite):
                    taken.append(column)
                elif text != new[column]:
                    left.append(escape_unprintable(new["file_name"]))
            if taken:
                replaceable = [c for column in taken for c in (REPLACED if column == "text" else (column,))]
                table.change(row, {key: new[key] for key in replaceable if key in new}, replaceable)
                yield number, row

"""What the model is asked for the images of shards: the run's prompt, a template's, or that of a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caption_train.captioning.prompts import PromptFinder, read_prompt, read_rows, read_tags, read_text
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError
from caption_train.families.base import Family
from caption_train.packed import PackedFile
from caption_train.shards.places import Shard
from caption_train.shards.records import Record, ShardReader

_OF_RECORD = frozenset({"prompt", "tags"})
"""Fields of a template that are in the JSON of a key, or in columns."""


class ShardPrompts(PromptFinder):
    """Finds the prompts of records; see PromptFinder. Rows of `--metadata` beyond some thousand are on disk.

    Raises:
        UsageError: a template has fields that there are not, or `--metadata` cannot be read.
    """

    def __init__(self, options: CaptionOptions, family: Family, prompt: str) -> None:
        super().__init__(options, family, prompt)
        if options.metadata:
            self._rows = read_rows(options.metadata, self._flag, self._columns, str)

    def find(self, shard: Shard, reader: ShardReader, record: Record, place: int) -> str:
        """Return what is asked for one caption of a record.

        Args:
            shard, reader: that hold it.
            record: the record.
            place: of the caption among those of the record.

        Raises:
            CaptionTrainError: what the template needs cannot be read, or the family cannot read the prompt;
                the line begins with the image.
        """
        folder = Path(shard.name).stem
        row = self._find_row(folder, record)
        fields: Mapping[str, Any] = record.load_fields() if self.fields & _OF_RECORD else {}

        def find_value(field: str) -> str:
            if field == "caption":
                held = record.captions[reader.columns.index("text")]
                if held.problem:
                    raise CaptionTrainError("its caption cannot be read")
                return held.text or read_text(row)
            if field == "prompt":
                return read_prompt(row) or read_prompt(fields) or self._prompt
            if field == "tags":
                return read_tags(row) or read_tags(fields)
            return Path(record.key).name if field == "name" else folder

        return self._choose(reader.name_member(record.key), self.keys[place], row, find_value)

    def _find_row(self, folder: str, record: Record) -> Mapping[str, Any]:
        """Return the row of a record, found by its name in the folder of the unpacked shard, or alone."""
        if not self._rows:
            return {}
        inner = record.image.inner if isinstance(record.image, PackedFile) else record.file_name
        for name in dict.fromkeys((f"{folder}/{inner}", inner, record.file_name)):
            if (row := self._rows.get(name)) is not None:
                return row
        return {}

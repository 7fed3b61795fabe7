"""What the model is asked for every image: the run's prompt, a template's, or that of the image's row.

Standard library only.
"""

import csv
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from caption_train.captioning.sinks.caption_paths import CaptionPaths
from caption_train.captioning.sinks.row_text import make_table
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.config.captioning import CaptionOptions
from caption_train.data.formats import TEXT_COLUMNS
from caption_train.data.text import join_lines, read_caption, refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.system.console import escape_unprintable
from caption_train.system.files import opening_regular_file

FIELDS = ("caption", "tags", "name", "folder")
"""Fields of a prompt template."""
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Task:
    """One caption to make. key: the name of its prompt in `--prompts`, "" where there is one prompt."""

    image: Path
    prompt: str
    key: str = ""


class Template:
    """A prompt with fields.

    >>> Template("--prompt_template", "{name} {{is}} in {folder}").fill({"name": "a", "folder": "b"})
    'a {is} in b'

    Args:
        flag: the flag that it comes from, for messages.
        text: the prompt; `{{` and `}}` are braces.

    Raises:
        UsageError: a field that there is not, or a single brace.
    """

    def __init__(self, flag: str, text: str) -> None:
        known = " ".join(f"{{{name}}}" for name in FIELDS)
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UsageError(f"{flag}: {error}; the fields are {known}, and {{{{ }}}} are braces") from None
        for _, field, spec, conversion in self._parts:
            if field is not None and (field not in FIELDS or spec or conversion):
                shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise UsageError(
                    f"{flag}: {{{shown}}} is no field; there are {known}, and {{{{ }}}} are braces"
                )
        self.fields = frozenset(field for _, field, _, _ in self._parts if field)

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the prompt with these values in the place of its fields."""
        return "".join(
            literal + (values.get(field, "") if field else "") for literal, field, _, _ in self._parts
        )


def read_named_prompts(entries: Sequence[str]) -> dict[str, str]:
    """Return name → prompt from a checked `--prompts`.

    >>> read_named_prompts(["short=<CAPTION>", "long=What is this?"])
    {'short': '<CAPTION>', 'long': 'What is this?'}
    """
    return {name: prompt for name, _, prompt in (entry.partition("=") for entry in entries)}


class Prompts:
    """Finds the prompt of every image.

    Args:
        options: the flags of the run.
        family: checks the prompts.
        prompt: of images without one of their own.
    """

    def __init__(self, options: CaptionOptions, family: Family, prompt: str) -> None:
        self._family, self._prompt, self._options = family, prompt, options
        named = read_named_prompts(options.prompts)
        self._templates = {key: Template(f"--prompts {key}", text) for key, text in named.items()}
        if options.prompt_template is not None:
            self._templates[""] = Template("--prompt_template", options.prompt_template)
        self._paths = CaptionPaths(options.caption_extension)
        self._rows: DiskDict[Mapping[str, Any]] = DiskDict()
        source = options.metadata or options.output
        if source and (options.metadata or source.exists()):
            self._flag = f"--metadata {source}" if options.metadata else f"--output {source}"
            fields = {field for template in self._templates.values() for field in template.fields}
            columns = {"caption": TEXT_COLUMNS, "tags": ("tags",)}
            wanted = ["prompt", *(column for field in fields for column in columns.get(field, ()))]
            # The sink reads --output whole, and says what is wrong with it.
            if options.metadata or _mentions(source, wanted):
                self._rows = read_rows_by_image(source, self._flag, wanted)
        self.own = 0
        """How many images are asked what their row says."""

    @property
    def keys(self) -> list[str]:
        """The names of `--prompts`, or [""]."""
        return [key for key in self._templates if key] or [""]

    def describe(self) -> list[str]:
        """Return a line about prompts of rows, if there are any."""
        return (
            [f"{self._flag}: its column prompt says what {self.own:,} images are asked"] if self.own else []
        )

    def find(self, image: Path, key: str = "") -> Task:
        """Return what to ask for an image.

        Raises:
            CaptionTrainError: what the template needs cannot be read, or the family cannot read the prompt;
                the line begins with the image.
        """
        try:
            prompt = self._find(image, key)
            refuse_odd_characters(prompt)
            if prompt != self._prompt:
                self._family.check_prompt(prompt)
        except (CaptionTrainError, UsageError, ValueError) as error:
            raise CaptionTrainError(f"{escape_unprintable(image)}: {error}") from error
        return Task(image, prompt, key)

    def _find(self, image: Path, key: str) -> str:
        row = self._rows.get(_place(image), {}) if self._rows else {}
        own = row.get("prompt") if not key else None
        if own is not None and not isinstance(own, str):
            raise ValueError("prompt in its row is not a string")
        if own:
            self.own += 1
            return own
        template = self._templates.get(key)
        if template is None:
            return self._prompt
        values = {"name": image.stem, "folder": image.absolute().parent.name}
        if "caption" in template.fields:
            values["caption"] = self._caption(image, row)
        if "tags" in template.fields:
            values["tags"] = _tags(row.get("tags"))
        return template.fill(values)

    def _caption(self, image: Path, row: Mapping[str, Any]) -> str:
        path = self._paths.find(image)
        if path is not None:
            return read_caption(path)
        return join_lines(next((row[c] for c in TEXT_COLUMNS if isinstance(row.get(c), str)), ""))


def read_rows_by_image(path: Path, flag: str, columns: Sequence[str]) -> DiskDict[Mapping[str, Any]]:
    """Return image → these columns of its first row in a `.jsonl` or `.csv` file.

    Names in it are relative to its folder.

    Raises:
        UsageError: the file cannot be read.
    """
    rows: DiskDict[Mapping[str, Any]] = DiskDict()
    try:
        for row in make_table(path).open(path, _MOST_BYTES):
            name = row.values.get("file_name") if isinstance(row.values, dict) else None
            if (
                isinstance(name, str)
                and "\0" not in name
                and (place := _place(path.parent / name)) not in rows
            ):
                rows[place] = {column: row.values[column] for column in columns if column in row.values}
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{flag}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return rows


def _mentions(path: Path, columns: Sequence[str]) -> bool:
    """Tell whether a row may have one of these columns, without reading the rows one by one."""
    # JSON may spell any letter as an escape.
    wanted = [b"\\u", *(column.encode() for column in columns)]
    try:
        with opening_regular_file(path) as file:
            return any(word in line for line in file for word in wanted)
    except (OSError, ValueError):
        return False


def _place(image: Path) -> str:
    """Return where an image is, however its folder is reached; an image that is a link is itself."""
    return f"{_real_folder(image.parent)}/{image.name}"


_real_folder = lru_cache(maxsize=1024)(os.path.realpath)


def _tags(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(tag) for tag in value)
    return value if isinstance(value, str) else ""

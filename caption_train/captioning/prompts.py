"""What the model is asked for every image: the run's prompt, a template's, or that of the image's row.

Standard library only.
"""

import csv
import os
import string
from collections.abc import Callable, Mapping, Sequence
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

FIELDS = ("caption", "tags", "name", "folder", "prompt")
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


class PromptFinder:
    """What the prompts of images are found with, be they files or in shards.

    Args:
        options: the flags of the run.
        family: checks the prompts.
        prompt: of images without one of their own.

    Attributes:
        fields: what the templates have.
        own: how many images are asked what their row says, and nothing else.
    """

    def __init__(self, options: CaptionOptions, family: Family, prompt: str) -> None:
        self._family, self._prompt = family, prompt
        named = read_named_prompts(options.prompts)
        self._templates = {key: Template(f"--prompts {key}", text) for key, text in named.items()}
        if options.prompt_template is not None:
            self._templates[""] = Template("--prompt_template", options.prompt_template)
        self.fields = {field for template in self._templates.values() for field in template.fields}
        self._rows: DiskDict[Mapping[str, Any]] = DiskDict()
        self._flag = f"--metadata {options.metadata}" if options.metadata else f"--output {options.output}"
        self.own = 0

    @property
    def keys(self) -> list[str]:
        """The names of `--prompts`, or [""]."""
        return [key for key in self._templates if key] or [""]

    def describe(self, own: int | None = None) -> list[str]:
        """Return a line about prompts of rows, if there are any.

        own: how many images are asked what their row says; by default those that this process has found.
        """
        own = self.own if own is None else own
        return [f"{self._flag}: its column prompt says what {own:,} images are asked"] if own else []

    @property
    def _columns(self) -> list[str]:
        """The columns of rows that prompts depend on."""
        columns = {"caption": TEXT_COLUMNS, "tags": ("tags",)}
        return ["prompt", *(column for field in self.fields for column in columns.get(field, ()))]

    def _choose(self, name: str, key: str, row: Mapping[str, Any], find_value: Callable[[str], str]) -> str:
        """Return a prompt that the family can read.

        Args:
            name: of the image, for messages.
            key: the name of the prompt in `--prompts`.
            row: of the image.
            find_value: returns the value of a field; ValueError or CaptionTrainError where it cannot be read.

        Raises:
            CaptionTrainError: there is none; the line begins with the image.
        """
        try:
            template = self._templates.get(key)
            prompt = self._prompt
            if not key and not (template and "prompt" in template.fields) and (own := read_prompt(row)):
                self.own += 1
                prompt = own
            elif template:
                prompt = template.fill({field: find_value(field) for field in template.fields})
            refuse_odd_characters(prompt)
            if prompt != self._prompt:
                self._family.check_prompt(prompt)
        except (CaptionTrainError, UsageError, ValueError) as error:
            raise CaptionTrainError(f"{escape_unprintable(name)}: {error}") from error
        return prompt


class Prompts(PromptFinder):
    """Finds the prompt of every image that is a file; see PromptFinder."""

    def __init__(self, options: CaptionOptions, family: Family, prompt: str) -> None:
        super().__init__(options, family, prompt)
        self._paths = CaptionPaths(options.caption_extension)
        source = options.metadata or options.output
        # The sink reads --output whole, and says what is wrong with it.
        if options.metadata or (source and source.exists() and _mentions(source, self._columns)):
            self._rows = read_rows(
                source, self._flag, self._columns, lambda name: _place(source.parent / name)
            )

    def find(self, image: Path, key: str = "") -> Task:
        """Return what to ask for an image.

        Raises:
            CaptionTrainError: what the template needs cannot be read, or the family cannot read the prompt;
                the line begins with the image.
        """
        row = self._rows.get(_place(image), {}) if self._rows else {}
        prompt = self._choose(str(image), key, row, lambda field: self._find_value(field, image, row))
        return Task(image, prompt, key)

    def _find_value(self, field: str, image: Path, row: Mapping[str, Any]) -> str:
        if field == "caption":
            path = self._paths.find(image)
            return read_text(row) if path is None else read_caption(path)
        if field == "prompt":
            return read_prompt(row) or self._prompt
        if field == "tags":
            return read_tags(row)
        return image.stem if field == "name" else image.absolute().parent.name


def read_rows(
    path: Path, flag: str, columns: Sequence[str], find_key: Callable[[str], str]
) -> DiskDict[Mapping[str, Any]]:
    """Return these columns of the rows of a `.jsonl` or `.csv` file, the first one of each image.

    Args:
        path: the file.
        flag: that names it, and its value, for messages.
        columns: the columns.
        find_key: returns by what a row is found, from its `file_name`.

    Raises:
        UsageError: the file cannot be read.
    """
    rows: DiskDict[Mapping[str, Any]] = DiskDict()
    try:
        for row in make_table(path).open(path, _MOST_BYTES):
            name = row.values.get("file_name") if isinstance(row.values, dict) else None
            if isinstance(name, str) and "\0" not in name and (key := find_key(name)) not in rows:
                rows[key] = {column: row.values[column] for column in columns if column in row.values}
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


def read_prompt(row: Mapping[str, Any]) -> str:
    """Return the prompt in a row, "" where there is none; ValueError where it is no text."""
    own = row.get("prompt")
    if own is not None and not isinstance(own, str):
        raise ValueError("prompt in its row is not a string")
    return own or ""


def read_tags(row: Mapping[str, Any]) -> str:
    """Return the tags in a row, "" where there are none."""
    tags = row.get("tags")
    if isinstance(tags, list):
        return ", ".join(map(str, tags))
    return tags if isinstance(tags, str) else ""


def read_text(row: Mapping[str, Any]) -> str:
    """Return the caption in a row on one line, "" where there is none."""
    return join_lines(next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), ""))

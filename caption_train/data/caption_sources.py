"""Reads captions that other tools keep in one file: LLaVA and ShareGPT, messages, COCO, CSV, parquet.

What a file is, its content says. Its images are files of the dataset folder, named by their path or the end
of it.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.data.formats import MAX_CAPTION_BYTES
from caption_train.data.kohya import find_images, index_images
from caption_train.data.scan import Folder
from caption_train.data.text import join_lines, refuse_odd_characters
from caption_train.errors import CaptionTrainError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import parse_json, read_regular_file

IMAGE_COLUMNS = (
    "file_name",
    "image",
    "images",
    "image_path",
    "img_path",
    "filename",
    "filepath",
    "path",
    "file",
)
CAPTION_COLUMNS = ("text", "caption", "captions")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant", "model", "chatgpt", "bing")
_MOST_BYTES = 4 << 30
_LONGEST_CELL = (1 << 31) - 1

Record = tuple[str, Any]
"""(where it stands, what it says)"""


@dataclass(frozen=True)
class Said:
    """A caption of an image. where: it was read. prompt: what was asked for it; None if that is not said."""

    caption: str
    where: str
    prompt: str | None = None


def read_captions_file(path: Path, folder: Folder) -> tuple[dict[str, list[Said]], list[str]]:
    """Read a file of captions for the images of `folder`.

    Args:
        path: a `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet` file.
        folder: the dataset folder, already scanned.

    Returns:
        Image → its captions, in the order of the file, and one line per entry that could not be used.

    Raises:
        CaptionTrainError: the file cannot be read, or holds no captions.
    """
    try:
        records = list(_read_records(path))
    except UnicodeError as error:
        raise CaptionTrainError(f"{escape_unprintable(path)}: not UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CaptionTrainError(f"{escape_unprintable(path)}: {reason}") from error
    index, found, problems = index_images(folder), {}, []
    for where, record in records:
        try:
            images = _find(record, index)
            for said in _list_said(record, where):
                for image in images:
                    if said not in (known := found.setdefault(image, [])):
                        known.append(said)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if not found:
        first = f", the first: {problems[0]}" if problems else ""
        raise CaptionTrainError(f"{escape_unprintable(path)}: no caption of an image in the folder{first}")
    return found, problems


def _read_records(path: Path) -> Iterator[Record]:
    if path.suffix.lower() == ".parquet":
        yield from _number(path, _read_parquet(path), first=0)
        return
    content = read_regular_file(path, _MOST_BYTES)
    if path.suffix.lower() in (".csv", ".tsv"):
        text = content.decode("utf-8-sig")
        csv.field_size_limit(_LONGEST_CELL)  # Tables hold whole pictures too, beside their captions.
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=_find_delimiter(path, text))
        yield from _number(path, rows, first=2)
    elif path.suffix.lower() == ".jsonl":
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                where = f"{path.name}:{number}"
                try:
                    yield where, parse_json(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
    else:
        yield from _list_entries(path, parse_json(content))


def _find_delimiter(path: Path, text: str) -> str:
    """Return what stands between the cells: spreadsheets write semicolons where commas are in numbers."""
    head = text.partition("\n")[0]
    if path.suffix.lower() == ".tsv":
        return "\t"
    return ";" if ";" in head and "," not in head else ","


def _list_entries(path: Path, content: Any) -> Iterator[Record]:
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        yield from _read_coco(path, content)
    elif isinstance(content, dict) and isinstance(content.get("data"), list):
        yield from _number(path, content["data"], first=0)
    elif isinstance(content, list):
        yield from _number(path, content, first=0)
    else:
        raise ValueError("neither a list of captions nor COCO's images and annotations")


def _read_coco(path: Path, content: Mapping[str, Any]) -> Iterator[Record]:
    """Yield COCO's captions, https://cocodataset.org/#format-data: annotations name images by their id."""
    images = content.get("images")
    names = {
        image["id"]: image.get("file_name")
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict) and isinstance(image.get("id"), int | str)
    }
    for where, annotation in _number(path, content["annotations"], first=0):
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            yield (
                where,
                {"file_name": names.get(annotation["image_id"]), "caption": annotation.get("caption")},
            )
        else:
            yield where, annotation


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet, types
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow: pip install pyarrow") from error
    if not path.is_file():
        raise ValueError("not a regular file")
    with parquet.ParquetFile(path) as file:
        # An image is often stored whole, as {bytes, path}: the path is enough.
        columns = [f"{f.name}.path" if types.is_struct(f.type) else f.name for f in file.schema_arrow]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _number(path: Path, records: Iterable[Any], *, first: int) -> Iterator[Record]:
    for number, record in enumerate(records, first):
        yield f"{path.name}:{number}", record


def _find(record: Any, index: Mapping[str, list[str]]) -> list[str]:
    """Return the images that a record names; ValueError, with the reason, if there is not exactly one."""
    if not isinstance(record, dict):
        raise ValueError("not an object")
    named = [record[column] for column in IMAGE_COLUMNS if record.get(column)]
    named = named or [part for part in _list_parts(record) if isinstance(part, str)]
    while named and isinstance(named[0], list | dict):
        value = named[0]
        if isinstance(value, list) and len(value) != 1:
            raise ValueError(f"{len(value)} images, not one")
        named = [value[0] if isinstance(value, list) else value.get("path")]
    if not named or not isinstance(named[0], str):
        raise ValueError("names no image")
    return find_images(index, named[0])


def _list_parts(record: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the images inside the messages of a conversation."""
    for column in CONVERSATION_COLUMNS:
        for message in record[column] if isinstance(record.get(column), list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict):
                    url = part.get("image_url")
                    yield part.get("image") or (url.get("url") if isinstance(url, dict) else url)


def _list_said(record: Mapping[str, Any], where: str) -> list[Said]:
    turns = next((record[column] for column in CONVERSATION_COLUMNS if record.get(column)), None)
    if turns is not None:
        said = list(_read_turns(turns))
    else:
        captions = next((record[column] for column in CAPTION_COLUMNS if record.get(column)), None)
        captions = captions if isinstance(captions, list) else [captions]
        said = [(caption, record.get("prompt")) for caption in captions]
    return [Said(_check(caption), where, _check(prompt) if prompt else None) for caption, prompt in said]


def _read_turns(turns: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (answer, question) of a conversation; what a system says, or a tool, is left out."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("its conversation is not a list of messages")
    question, answers = None, 0
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        text = _text_of(turn.get("content", turn.get("value")))
        if role in _ASKING:
            question = " ".join(text.replace("<image>", " ").split())
        elif role in _ANSWERING and question is not None:
            answers += 1
            yield text, question
            question = None
    if not answers:
        raise ValueError("its conversation has no answer")


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        content = "\n".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise ValueError("a message without text")
    return content


def _check(text: Any) -> str:
    if not isinstance(text, str) or not (text := join_lines(text)):
        raise ValueError(
            "no caption" if text is None or text == "" else "a caption or prompt is not a string"
        )
    if len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
        raise ValueError("a caption or prompt is longer than 1 MB")
    refuse_odd_characters(text)
    return text

"""Hands what the compile command found to the examination of --report, and says how to review it."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from caption_train.compiling.summary import list_left_over
from caption_train.data.dataset import read_metadata
from caption_train.data.formats import METADATA_NAME
from caption_train.examining.examine import Dataset, Examination, Review, list_counts
from caption_train.system.console import escape_unprintable
from caption_train.system.launcher import start_command

if TYPE_CHECKING:
    from caption_train.compiling.result import Compiled
    from caption_train.config.compiling import CompileOptions


def measure(examination: Examination, compiled: Compiled) -> dict[str, str]:
    """Examine all images and captions that were found; return image → why it cannot be decoded.

    Where there are none but those of a metadata.jsonl, which training reads as it is, they are examined.
    """
    folder = compiled.folder
    captions = [(name, pair.caption) for name in compiled.pairs for pair in compiled.pairs_of(name)]
    rows = None if captions else _read_rows(compiled)
    captions = rows[0] if rows else captions
    having = {name for name, _ in captions}
    lacking = [name for name in folder.images if name not in having]
    return examination.measure(Dataset(folder.root, folder.images, captions, lacking))


def _read_rows(compiled: Compiled) -> tuple[list[tuple[str, str]], list[str]] | None:
    """Return (image, caption) of each row of the folder's metadata.jsonl, and what is wrong with others."""
    if METADATA_NAME not in compiled.folder.metadata:
        return None
    root = compiled.folder.root
    pairs, problems = read_metadata(root / METADATA_NAME)
    names = set(compiled.folder.images)
    found = [(Path(os.path.relpath(pair.image, root)).as_posix(), pair.caption) for pair in pairs]
    return [(name, caption) for name, caption in found if name in names], problems


def write_report(examination: Examination, compiled: Compiled, options: CompileOptions) -> None:
    """Write the page, after the dataset."""
    rows = [
        ("images", len(compiled.folder.images), ""),
        ("pairs of image and caption", len(compiled.pairs), "the dataset"),
        *(
            [("captions of them", sum(map(len, map(compiled.pairs_of, compiled.pairs))), "")]
            * bool(compiled.more)
        ),
        *([("held out for validation", len(compiled.held_out), "")] * bool(compiled.held_out)),
    ]
    if not compiled.rows and not compiled.pairs and (read := _read_rows(compiled)):
        rows += [(f"rows of {METADATA_NAME}", len(read[0]), "training reads them as they are")]
        rows += [("rows that cannot be used", read[1], "")] if read[1] else []
    examination.write(
        list_counts([*rows, *list_left_over(compiled, options)]), _make_review(compiled, options)
    )
    compiled.report = options.report


def _make_review(compiled: Compiled, options: CompileOptions) -> Review:
    """Return how to review what was found: the metadata.jsonl with its captions, else the files."""
    folder, name_of = options.dataset_dir, lambda name: name
    is_there = compiled.written or (compiled.output_dir / METADATA_NAME).is_file()
    if compiled.prefix is not None and is_there:
        folder, name_of = compiled.output_dir, compiled.file_name
    elif compiled.prefix is None and compiled.written:
        folder, name_of = compiled.output_dir, lambda name: name if name in compiled.pairs else None
    flags: list[str] = []
    files = Counter(ending for (_, ending), names in compiled.folder.captions.items() for _ in names)
    if files and not (folder / METADATA_NAME).is_file() and (usual := files.most_common(1)[0][0]) != ".txt":
        flags = ["--caption_extension", usual]
    start = start_command("review", None, ["python", "review_captions.py"])
    return Review(escape_unprintable(shlex.join([*start, str(folder), *flags])), name_of)

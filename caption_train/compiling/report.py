"""Hands what the compile command found to the examination of --report, and says how to review it."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from caption_train.compiling.summary import list_left_over
from caption_train.data.formats import METADATA_NAME
from caption_train.examining.examine import Dataset, Examination, Review, list_counts
from caption_train.system.console import escape_unprintable
from caption_train.system.launcher import start_command

if TYPE_CHECKING:
    from caption_train.compiling.result import Compiled
    from caption_train.config.compiling import CompileOptions


def measure(examination: Examination, compiled: Compiled) -> dict[str, str]:
    """Examine all images and captions that were found; return image → why it cannot be decoded."""
    captions = [(name, pair.caption) for name in compiled.pairs for pair in compiled.pairs_of(name)]
    lacking = [name for name in compiled.folder.images if name not in compiled.pairs]
    return examination.measure(Dataset(compiled.folder.root, compiled.folder.images, captions, lacking))


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

"""Reads a run's pairs; no image is decoded. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from caption_train.config.training import TrainOptions
from caption_train.data.columns.parts import Part, PartFound, Work
from caption_train.data.columns.table import SPLITS, Pairs, PairTable
from caption_train.data.image_index import ImageIndex, index_path
from caption_train.errors import UsageError
from caption_train.shards.dataset import inspect_any_table
from caption_train.system.console import escape_unprintable


@dataclass
class Found:
    """What was read of a run's datasets.

    Attributes:
        train: pairs to train on.
        validation: pairs to validate on, of the same table.
        problems: one line per bad row or file.
        notes: what is odd but harms nothing.
    """

    train: Pairs
    validation: Pairs
    problems: list[str]
    notes: list[str] = field(default_factory=list)


def read_here(parts: Iterable[Part]) -> list[PartFound]:
    """Read parts of a dataset one after the other, with what is known of their images."""
    with ImageIndex(index_path()) as index:
        return [read_part(part, index) for part in parts]


def read_part(part: Part, index: ImageIndex) -> PartFound:
    """Read a part of a dataset; of images that earlier runs have decoded, it has digest and size."""
    found = part.read()
    if found.stamps is not None:
        index.find_rows(found.table, found.stamps)
        found.stamps = None
    return found


def read_pairs(options: TrainOptions, work: Work = read_here) -> Found:
    """Read the pairs of all datasets of a run; no image is decoded.

    Args:
        options: the options of the run.
        work: reads the parts of a dataset.

    Raises:
        UsageError: a dataset cannot be read, or validation images are named twice.
    """
    tables, problems, notes = [], [], []
    folders = [folder for folder, _ in options.datasets]
    for number, folder in enumerate([*folders, *filter(None, [options.validation_dir])]):
        is_own = number < len(folders)
        if options.validation_split or not is_own:
            _refuse_second_validation(options, tables)
        pairs, more, odd = inspect_any_table(
            folder,
            caption_extensions=options.caption_extension,
            follow_symlinks=options.follow_symlinks,
            split=None,
            work=work,
        )
        table = pairs.table
        if is_own:
            table.dataset[:] = number
        else:
            table.split[:] = SPLITS.index("validation")
        tables.append(table)
        notes += odd
        named = is_own and options.add_dataset
        problems += [f"{escape_unprintable(folder)}: {line}" for line in more] if named else more
    if options.validation_split:
        _refuse_second_validation(options, tables)
    every = Pairs(PairTable.join(tables) if len(tables) > 1 else tables[0])
    splits = every.table.split
    return Found(*(every.keep(splits == SPLITS.index(s)) for s in ("train", "validation")), problems, notes)


def _refuse_second_validation(options: TrainOptions, tables: list[PairTable]) -> None:
    held_out = sum(int((table.split == SPLITS.index("validation")).sum()) for table in tables)
    if held_out:
        raise UsageError(
            f"--dataset_dir {options.dataset_dir}: {held_out} rows are held out for validation "
            "already; drop --validation_split or --validation_dir"
        )

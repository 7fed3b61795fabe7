"""Decides where a dataset is written, and links or copies images into another folder."""

import filecmp
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from caption_train.data.formats import is_inside
from caption_train.errors import UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_atomically

Placement = list[tuple[Path, Path]]
"""(image, file to make of it) for every image that is not there yet"""


def find_prefix(dataset_dir: Path, output_dir: Path) -> str | None:
    """Return what goes before an image's name in `dataset_dir` to reach it from `output_dir`.

    A row's file_name must lie in or below the folder of its metadata.jsonl. If `output_dir` does not contain
    the dataset, the images must be placed in it.

    Returns:
        "" or a folder with a slash, e.g. "images/"; None if the images must be placed.

    Raises:
        UsageError: `output_dir` is a file, or lies inside the dataset, where the next run would find the
            placed images too.
    """
    dataset, output = os.path.realpath(dataset_dir), os.path.realpath(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"output_dir {escape_unprintable(output_dir)}: is a file, not a folder")
    if is_inside(dataset, output):
        return "" if dataset == output else f"{Path(dataset).relative_to(output).as_posix()}/"
    if is_inside(output, dataset):
        raise UsageError(
            f"output_dir {escape_unprintable(output_dir)} lies inside dataset_dir: its images would be found "
            "twice; give a folder beside or above it, or none"
        )
    return None


def plan_placement(
    dataset_dir: Path, names: Iterable[str], output_dir: Path, *, by_copy: bool = False
) -> tuple[Placement, list[str]]:
    """Find out which images must be placed in `output_dir`.

    Args:
        dataset_dir: the folder that holds the images.
        names: image paths relative to it.
        output_dir: the folder that is to hold them.
        by_copy: whether an image that is a hard link there must become a copy.

    Returns:
        The images to place, and the names under which a different file is in `output_dir` already.
    """
    todo, conflicts = [], []
    for name in names:
        source, target = dataset_dir / name, output_dir / name
        if not os.path.lexists(target):
            todo.append((source, target))
        elif _is_linked(source, target):
            todo += [(source, target)] if by_copy else []
        elif not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            todo.append((source, target))
            conflicts.append(name)
    return todo, conflicts


def place_images(placement: Placement, *, by_copy: bool = False) -> int:
    """Hard-link or copy each image, replacing what is there. No image is ever half-written.

    Images are copied if the file system has no hard links, or if the two folders are on different ones.

    Args:
        placement: (image, file to make) for each image.
        by_copy: always copy.

    Returns:
        How many images were copied.
    """
    copies = 0
    for source, target in placement:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if by_copy or not _link(source, target):
            with source.open("rb") as original, open_atomically(target, "wb") as copy:
                shutil.copyfileobj(original, copy)
            copies += 1
    return copies


def _link(source: Path, target: Path) -> bool:
    try:
        # Resolved first: a hard link to a symbolic link is a symbolic link, perhaps broken in the new folder.
        target.hardlink_to(os.path.realpath(source))
    except OSError:
        return False
    return True


def _is_linked(source: Path, target: Path) -> bool:
    return target.is_file() and not target.is_symlink() and source.samefile(target)

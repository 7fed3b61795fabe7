"""Writes what was accepted as a dataset, and says the commands that train on it."""

import os
from collections.abc import Sequence
from pathlib import Path

from caption_train.adapters.continuing import adopt_adapter
from caption_train.compiling.placement import place_images, plan_placement
from caption_train.compiling.summary import list_training_commands
from caption_train.config.training import TrainOptions
from caption_train.data.formats import METADATA_NAME, is_inside, is_portable
from caption_train.data.rows import write_metadata
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import FAMILIES
from caption_train.reviewing.items import Item
from caption_train.system.console import escape_unprintable
from caption_train.system.files import write_atomically

MARK = ".caption-train-accepted"
"""A file in a folder that was written here, and may be written again."""


def choose_output_dir(images: Path, output_dir: Path | None) -> Path:
    """Return the folder for what was accepted: `output_dir`, else one beside the images.

    Raises:
        UsageError: it holds something else, or lies inside the images.
    """
    real = Path(os.path.realpath(images))
    target = output_dir or real.with_name(f"{real.name or 'images'}-accepted")
    if is_inside(os.path.realpath(target), str(real)) or is_inside(str(real), os.path.realpath(target)):
        raise UsageError(
            f"--output_dir {escape_unprintable(target)}: lies in the folder of images, or holds it: name "
            "one beside it"
        )
    if target.exists() and not target.is_dir():
        raise UsageError(f"--output_dir {escape_unprintable(target)}: is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        raise UsageError(
            f"--output_dir {escape_unprintable(target)}: holds something else: name an empty or a new folder"
        )
    return target


def write_accepted(images: Path, target: Path, accepted: Sequence[tuple[Item, str]]) -> int:
    """Write accepted images, as hard links, and their captions to a folder; return how many were left out.

    Args:
        images: the folder of images.
        target: what `choose_output_dir` returned.
        accepted: the images and their captions.

    Raises:
        UsageError: nothing was accepted.
    """
    named = [(item, text) for item, text in accepted if is_portable(item.name)]
    if not named:
        raise UsageError("nothing was accepted yet, so there is nothing to train on")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / MARK, "review_captions.py wrote this folder and may replace what is in it\n")
    placement, _ = plan_placement(images, [item.name for item, _ in named], target)
    place_images(placement)
    write_metadata(target / METADATA_NAME, [{"file_name": i.name, "text": text} for i, text in named])
    return len(accepted) - len(named)


def list_commands(dataset_dir: Path, family: str | None = None, adapter: Path | None = None) -> list[str]:
    """Return the commands that train on a folder.

    Args:
        dataset_dir: the folder.
        family: the family to train; None lists a command for each.
        adapter: what suggested the captions; training goes on from it, where it is a plain LoRA.
    """
    real = os.path.realpath(dataset_dir)
    if is_inside(real, here := os.path.realpath(os.curdir)):
        dataset_dir = Path(os.path.relpath(real, here))
    flags = []
    if adapter is not None and _is_trainable(adapter):
        flags = ["--init_adapter", escape_unprintable(adapter)]
    return list_training_commands(
        escape_unprintable(dataset_dir), Path(real).name, [family] if family else FAMILIES, flags
    )


def _is_trainable(adapter: Path) -> bool:
    try:
        adopt_adapter(TrainOptions(init_adapter=adapter))
    except CaptionTrainError:
        return False
    return True

"""Keeps one tensor an image in a folder that all runs share: a file each, whole or absent, checked when read.

A folder belongs to one vision tower and one way to prepare images for it, and a file in it to one image by
its content. So runs on the same images and base share them, whatever adapter they train.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from caption_train.system.files import clear_temporary, finish_temporary, mode_of, open_own, open_temporary

if TYPE_CHECKING:
    import torch

NAME = "features"
SUFFIX = ".safetensors"


@dataclass
class FeatureStore:
    """Tensors by the SHA-256 of the image that they are of.

    It is safe with several processes, and with one that is killed: a file appears under its name when it is
    whole. Files are not synced to the disk one by one, because a lost one is only computed again; what a
    crash of the machine leaves behind is recognized by its checksum.

    Attributes:
        folder: the folder of one tower.
        room: how many bytes this process may still add; None is any number.
    """

    folder: Path
    room: int | None = None
    is_full: bool = field(default=False, init=False)

    def path(self, digest: str) -> Path:
        """Return the file of an image."""
        return self.folder / digest[:2] / f"{digest}{SUFFIX}"

    def has(self, digest: str) -> bool:
        """Return whether there is a file for an image."""
        path = self.path(digest)
        return path.is_file() and not path.is_symlink()

    def find_size(self) -> int | None:
        """Return how many bytes a file of this tower has, or None where there is no file yet."""
        return next((size for place in _folders(self.folder) for _, size, _ in _list_place(place)), None)

    def read(self, digest: str) -> torch.Tensor | None:
        """Return an image's tensor, or None where there is no whole one; a damaged file is removed."""
        path = self.path(digest)
        try:
            content = _read_regular(path)
        except OSError:
            return None
        tensor = _decode(content)
        # The time of the last use decides what `make_room` removes. Another process may have removed it.
        with suppress(OSError):
            path.unlink() if tensor is None else os.utime(path)
        return tensor

    def write(self, digest: str, tensor: torch.Tensor) -> bool:
        """Keep an image's tensor; return whether there was room for it on the disk and below the limit."""
        path = self.path(digest)
        if self.is_full or os.path.lexists(path):
            return not self.is_full
        content = _encode(tensor)
        if self.room is not None and self.room < len(content):
            self.is_full = True
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_temporary(path) as (file, temporary):
                file.write(content)
                finish_temporary(file, temporary, mode_of(path), is_synced=False)
                temporary.replace(path)
        except OSError:
            self.is_full = True
            return False
        if self.room is not None:
            self.room -= len(content)
        return True


def _read_regular(path: Path) -> bytes:
    """Return a file's bytes; OSError for a folder, a link, a pipe or a device, which could never end."""
    with os.fdopen(open_own(path), "rb") as file:
        return file.read()


def _encode(tensor: torch.Tensor) -> bytes:
    import torch
    from safetensors.torch import save

    tensor = tensor.detach().cpu().contiguous()
    check = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())
    return save({NAME: tensor}, metadata={"crc32": str(check)})


def _decode(content: bytes) -> torch.Tensor | None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(content[:8], "little")
        check = json.loads(content[8 : 8 + length])["__metadata__"]["crc32"]
        tensor = load(content)[NAME]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return tensor if str(zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())) == check else None


@dataclass(frozen=True)
class Room:
    """What is on the disk for features.

    Attributes:
        used: bytes in the folders of all towers.
        free: bytes that the disk has left.
    """

    used: int
    free: int


def measure_room(root: Path) -> Room:
    """Return how much room features take, and how much is left; `root` holds the folders of all towers."""
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    return Room(sum(size for _, size, _ in _list_files(root)), shutil.disk_usage(there).free)


def make_room(root: Path, limit: int, needed: int, keep: Callable[[Path], bool]) -> int:
    """Remove the files that were not used for the longest time, until `needed` more bytes are below `limit`.

    Args:
        root: the folder that holds the folders of all towers.
        limit: how many bytes they may have together.
        needed: how many bytes will be added.
        keep: whether a file belongs to the run that asks, which is never removed.

    Returns:
        How many bytes were removed.
    """
    files = sorted(_list_files(root))
    excess, removed = sum(size for _, size, _ in files) + needed - limit, 0
    for _, size, path in files:
        if removed >= excess:
            break
        if not keep(path):
            with suppress(OSError):
                path.unlink()
                removed += size
    return removed


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in the folder of one tower."""
    for place in _folders(folder):
        clear_temporary(place)


def _list_files(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield when each file was last used, its size, and its path."""
    for tower in _folders(root):
        for place in _folders(tower):
            yield from _list_place(place)


def _list_place(place: Path) -> Iterator[tuple[float, int, Path]]:
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield status.st_mtime, status.st_size, Path(entry.path)


def _folders(folder: Path) -> Iterable[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []

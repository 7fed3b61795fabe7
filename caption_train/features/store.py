"""Keeps the tensors of images in a folder that all runs share: a file an image, checked when read.

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

from caption_train.system.files import (
    Kept,
    clear_temporary,
    finish_temporary,
    list_kept,
    mode_of,
    open_own,
    open_temporary,
    remove_least_used,
)

if TYPE_CHECKING:
    import torch

    from caption_train.families.image_encoder import Tensors

SUFFIX = ".safetensors"
KEPT_FREE = 1 << 30
"""Bytes of the disk that are never filled with features."""


@dataclass
class FeatureStore:
    """Tensors by the SHA-256 of the image that they are of.

    It is safe with several processes, and with one that is killed: a file appears under its name when it is
    whole. Files are not synced to the disk one by one, because a lost one is only computed again; what a
    crash of the machine leaves behind is recognized by its checksum.

    Attributes:
        folder: the folder of one tower.
        room: how many bytes this process may still add; None is any number.
        limit: how many bytes the features of all towers may have. If it is given, `room` is claimed piece by
            piece, because other processes add to them too.
        problem: why the disk refused, once it did.
    """

    folder: Path
    room: int | None = None
    limit: int | None = None
    is_full: bool = field(default=False, init=False)
    problem: str | None = field(default=None, init=False)

    def path(self, digest: str) -> Path:
        """Return the file of an image."""
        return self.folder / digest[:2] / f"{digest}{SUFFIX}"

    def has(self, digest: str) -> bool:
        """Return whether there is a file for an image."""
        path = self.path(digest)
        return path.is_file() and not path.is_symlink()

    def size_of(self, digest: str) -> int | None:
        """Return how many bytes the file of an image has, or None if there is none."""
        try:
            status = self.path(digest).lstat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, digest: str) -> dict[str, torch.Tensor] | None:
        """Return an image's tensors, or None where there are no whole ones; a damaged file is removed."""
        path = self.path(digest)
        try:
            content = _read_regular(path)
        except OSError:
            return None
        tensors = _decode(content)
        # The time of the last use decides what is removed. Another process may have removed it.
        with suppress(OSError):
            path.unlink() if tensors is None else os.utime(path)
        return tensors

    def write(self, digest: str, tensors: Tensors) -> bool:
        """Keep an image's tensors; return whether there was room for them on the disk and below the limit."""
        path = self.path(digest)
        if self.is_full or os.path.lexists(path):
            return not self.is_full
        content = _encode(tensors)
        if self.room is not None and self.room < len(content):
            self.room = self._claim(len(content))
            if self.room < len(content):
                self.is_full = True
                return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_temporary(path) as (file, temporary):
                file.write(content)
                finish_temporary(file, temporary, mode_of(path), is_synced=False)
                temporary.replace(path)
        except OSError as error:
            self.is_full, self.problem = True, error.strerror or str(error)
            return False
        if self.room is not None:
            self.room -= len(content)
        return True

    def _claim(self, needed: int) -> int:
        """Return how many bytes may be written until the next claim: less and less towards the limit.

        So several processes exceed it by a file or a 256th at most, and for most of the way each writes many
        files without measuring.
        """
        if self.limit is None:
            return 0
        found = measure_room(self.folder.parent)
        left = max(0, min(self.limit - found.used, found.free - KEPT_FREE))
        return max(left // 4, min(left, max(needed, self.limit // 256)))


def _read_regular(path: Path) -> bytes:
    """Return a file's bytes; OSError for a folder, a link, a pipe or a device, which could never end."""
    with os.fdopen(open_own(path), "rb") as file:
        return file.read()


def _encode(tensors: Tensors) -> bytes:
    from safetensors.torch import save

    # As numbers of their own: views of one tensor are refused.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, metadata={"crc32": _checksum(tensors)})


def _decode(content: bytes) -> dict[str, torch.Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(content[:8], "little")
        check = json.loads(content[8 : 8 + length])["__metadata__"]["crc32"]
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return tensors if tensors and _checksum(tensors) == check else None


def _checksum(tensors: Tensors) -> str:
    """Return the CRC-32 of all names, types, shapes and numbers."""
    import torch

    check = 0
    for name, tensor in sorted(tensors.items()):
        check = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), check)
        check = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), check)
    return str(check)


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
    return Room(sum(file.size for file in list_features(root)), shutil.disk_usage(there).free)


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
    return remove_least_used(list_features(root), limit - needed, keep)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in the folder of one tower."""
    for place in _folders(folder):
        clear_temporary(place)


def list_features(root: Path) -> Iterator[Kept]:
    """Yield the files of all towers."""
    for tower in _folders(root):
        for place in _folders(tower):
            yield from list_kept(place, SUFFIX)


def _folders(folder: Path) -> Iterable[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []

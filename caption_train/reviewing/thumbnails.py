"""Makes small pictures of the images when they are asked for, and keeps them in the user's cache folder.

What a browser gets is always a JPEG that was made here, never the bytes of a file.
"""

import hashlib
import io
import os
import threading
from contextlib import suppress
from pathlib import Path

from PIL import Image

from caption_train.data.images import open_image
from caption_train.reviewing.items import Item, Library
from caption_train.system.files import list_kept, read_regular_file, remove_least_used, write_atomically

EDGES = {"thumbnail": 256, "picture": 1600}
"""The longer edge in pixels."""
_SUFFIX = ".jpg"
_QUALITY = 82
_KEPT_AFTER_PRUNING = 0.8


class Thumbnails:
    """A cache of small pictures. The least recently used ones are deleted where there are too many bytes.

    Args:
        library: the images.
        folder: where they are kept.
        most_bytes: how many bytes they may have together.
    """

    def __init__(self, library: Library, folder: Path, most_bytes: int) -> None:
        self._library = library
        self._folder = folder
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._bytes: int | None = None

    def get(self, item: Item, kind: str) -> bytes:
        """Return a JPEG of an image.

        Args:
            item: the image.
            kind: a key of EDGES.

        Raises:
            CaptionTrainError: the file is no image, or has become a link that leads out of the folder.
        """
        real = self._library.check(item.path)
        key = f"{real}\0{item.version}\0{EDGES[kind]}".encode(errors="surrogateescape")
        path = self._folder / f"{hashlib.blake2b(key, digest_size=20).hexdigest()}{_SUFFIX}"
        with suppress(OSError, ValueError):
            content = read_regular_file(path, is_own=True)
            os.utime(path)  # used just now
            return content
        content = _shrink(real, EDGES[kind])
        # A cache that cannot be written is none; the picture is there all the same.
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, content)
            self._count(len(content))
        return content

    def _count(self, size: int) -> None:
        with self._lock:
            if self._bytes is None:
                self._bytes = sum(file.size for file in list_kept(self._folder, _SUFFIX))
            else:
                self._bytes += size
            if self._bytes > self._most_bytes:
                files = list(list_kept(self._folder, _SUFFIX))
                most = int(self._most_bytes * _KEPT_AFTER_PRUNING)
                self._bytes = sum(file.size for file in files) - remove_least_used(files, most)


def _shrink(path: Path, edge: int) -> bytes:
    image = open_image(path, at_least=edge)
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()

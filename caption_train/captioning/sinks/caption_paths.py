"""Which file beside an image has its caption: `a.txt` beside `a.jpg`, or `a.jpg.txt`."""

import os
from array import array
from collections.abc import Collection
from functools import cache
from pathlib import Path

from caption_train.data.formats import IMAGE_SUFFIXES


class CaptionPaths:
    """Finds caption files, and names those that are missing. Each folder is listed once.

    Args:
        extension: of the caption files, with or without a dot.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat.png", "dog.png", "dog.jpg"):
    ...     (folder / name).touch()
    >>> paths = CaptionPaths(".txt")
    >>> [paths.path_of(folder / name).name for name in ("cat.png", "dog.png", "dog.jpg")]
    ['cat.txt', 'dog.png.txt', 'dog.jpg.txt']
    """

    def __init__(self, extension: str) -> None:
        self.extension = "." + extension.lstrip(".")
        # Folder → hashes of 64 bits of the stems that several images have: of a million none, as a rule.
        self._shared: dict[str, Collection[int]] = {}

    def path_of(self, image: Path) -> Path:
        """Return the path of an image's caption file, which may be there or not.

        It is `a.txt`, or `a.png.txt` if that exists or another image has the same stem. Training prefers
        `a.png.txt` too. `a.png.webp` beside `a.png` gets `a.png.webp.txt`, because `a.png.txt` belongs to
        `a.png`.
        """
        full = image.with_name(image.name + self.extension)
        # os.path, because it returns False for a name that is too long, where Path raises.
        if os.path.exists(full) or self._has_twin(image):  # noqa: PTH110
            return full
        return image.with_name(image.stem + self.extension)

    def find(self, image: Path) -> Path | None:
        """Return an image's caption file if it exists."""
        path, name, stem = _split(image)
        if os.path.exists(full := path + name + self.extension):  # noqa: PTH110
            return Path(full)
        if not os.path.exists(short := path + stem + self.extension):  # noqa: PTH110
            return None
        return None if _is_named_as_another(path, stem) else Path(short)

    def free_path(self, image: Path) -> str:
        """Return the path of an image's caption file where there is none yet."""
        path, name, stem = _split(image)
        return path + (name if self._has_twin(image) else stem) + self.extension

    def list_folder(self, folder: str) -> list[str]:
        """Look which stems several images in a folder have; return the names there that begin with a dot."""
        import numpy as np

        stems, hidden = array("q"), []
        is_image = cache(lambda suffix: suffix.lower() in IMAGE_SUFFIXES)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    hidden.append(name)
                dot = name.rfind(".")
                if dot > 0 and is_image(name[dot:]):
                    stems.append(hash(name[:dot]))
        found = np.frombuffer(stems, np.int64) if stems else np.empty(0, np.int64)
        found.sort()
        self._shared[folder] = frozenset(found[1:][found[1:] == found[:-1]].tolist())
        return hidden

    def _has_twin(self, image: Path) -> bool:
        """Tell whether another image has this stem, or this stem as its full name."""
        path, _, stem = _split(image)
        folder = path[:-1] or path or os.curdir
        if folder not in self._shared:
            self.list_folder(folder)
        return hash(stem) in self._shared[folder] or _is_named_as_another(path, stem)


def _split(image: Path) -> tuple[str, str, str]:
    """Return an image's folder with its separator, its name and its stem, as text: paths are slow."""
    text = str(image)
    start = text.rfind(os.sep) + 1
    dot = text.rfind(".", start + 1, -1)
    return text[:start], text[start:], text[start:] if dot < 0 else text[start:dot]


def _is_named_as_another(path: str, stem: str) -> bool:
    """Tell whether a stem is another image's full name, as for `a.png.webp` beside `a.png`."""
    is_images = stem[stem.rfind(".") :].lower() in IMAGE_SUFFIXES
    return is_images and os.path.lexists(path + stem)

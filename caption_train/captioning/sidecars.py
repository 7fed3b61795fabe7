"""Writes captions to files beside their images: `a.txt` beside `a.jpg`. Standard library only."""

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from caption_train.captioning.outputs import Caption, Sink
from caption_train.data.formats import IMAGE_SUFFIXES
from caption_train.data.text import read_caption, refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, print_line
from caption_train.system.exclusive import Signature, create_atomically, replace_unchanged
from caption_train.system.files import behind_link, clear_temporary
from caption_train.system.lock import OutputLock
from caption_train.system.processes import allow_open_files

FOLDER_LOCK = ".caption-train.lock"


class Sidecars(Sink):
    """A caption file beside every image.

    Args:
        extension: of the caption files, with or without a dot.
        overwrite: replace the caption files that exist when the run begins.
    """

    def __init__(self, extension: str, *, overwrite: bool = False) -> None:
        self._extension = "." + extension.lstrip(".")
        self._overwrite = overwrite
        self._twins = _Twins()
        self._locks: list[OutputLock] = []
        self._found: dict[Path, Signature | None] = {}

    def pending(self, images: Sequence[Path]) -> list[Path]:
        """Lock the images' folders, delete what killed runs have left there, and find the captions.

        Raises:
            UsageError: a folder cannot be written to, or a caption's name is a link to nothing.
            CaptionTrainError: another run is writing to a folder.
        """
        if self._extension.lower() in IMAGE_SUFFIXES:
            raise UsageError(f"--caption_extension {self._extension} would write over images")
        folders = list(dict.fromkeys(image.parent for image in images))
        for folder in folders:
            if not os.access(folder, os.W_OK):
                shown = escape_unprintable(folder)
                raise UsageError(f"--save_captions: {shown} cannot be written to; use --output instead")
        self._lock(folders)
        for folder in folders:
            clear_temporary(folder)
        return [image for image in images if self._lacks(image) or self._overwrite]

    def begin(self, images: Sequence[Path]) -> None:
        """Remember the caption files that `overwrite` may replace, to notice if somebody writes to them."""
        if self._overwrite:
            paths = {self.caption_path(image) for image in images}
            self._found = {path: Signature.of(behind_link(path)) for path in paths}

    def read(self, image: Path) -> str:
        """Return the text of an image's caption file."""
        path = self._find(image)
        return "" if path is None else read_caption(path)

    def write(self, caption: Caption) -> Caption | None:
        """Write one caption file; one that somebody else has written since the run began stays."""
        path = self.caption_path(caption.image)
        content = _encode(path, caption.text)
        there = None if self._overwrite else self._find(caption.image)
        try:
            found = self._found.get(path)
            if there is None and found is not None:
                done = replace_unchanged(behind_link(path), content, found)
            else:
                done = there is None and create_atomically(path, content)
        except OSError as error:
            raise CaptionTrainError(
                f"{escape_unprintable(path)}: cannot be written: {error.strerror or error}"
            ) from error
        return caption if done else _read_theirs(caption, there or path)

    def close(self) -> None:
        """Allow other runs to write to the folders."""
        for lock in self._locks:
            lock.release()
        self._locks = []

    def caption_path(self, image: Path) -> Path:
        """Return the path of an image's caption file.

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat.png", "dog.png", "dog.jpg"):
        ...     (folder / name).touch()
        >>> sidecars = Sidecars(".txt")
        >>> [sidecars.caption_path(folder / name).name for name in ("cat.png", "dog.png", "dog.jpg")]
        ['cat.txt', 'dog.png.txt', 'dog.jpg.txt']

        It is `a.txt`, or `a.png.txt` if that exists or another image has the same stem. Training prefers
        `a.png.txt` too. `a.png.webp` beside `a.png` gets `a.png.webp.txt`, because `a.png.txt` belongs to
        `a.png`.
        """
        full = image.with_name(image.name + self._extension)
        # os.path, because it returns False for a name that is too long, where Path raises.
        if os.path.exists(full) or self._twins.has(image):  # noqa: PTH110
            return full
        return image.with_name(image.stem + self._extension)

    def _lock(self, folders: Sequence[Path]) -> None:
        real = list(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))
        allow_open_files(len(real))
        for folder in real:
            where = f"--save_captions: {escape_unprintable(folder)}"
            lock = OutputLock(folder, FOLDER_LOCK, where, instead="wait until it is done")
            try:
                line = lock.acquire()
            except OSError as error:
                many = f"; {len(real):,} folders at once are too many" if error.errno == errno.EMFILE else ""
                raise CaptionTrainError(f"{where}: {error.strerror or error}{many}") from error
            self._locks.append(lock)
            if line:
                print_line(line)

    def _lacks(self, image: Path) -> bool:
        path = self._find(image) or self.caption_path(image)
        # os.path, because it returns False for a name that is too long, where Path raises.
        exists, shown = os.path.exists(path), escape_unprintable(path)  # noqa: PTH110
        if not exists and os.path.islink(path):  # noqa: PTH114
            raise UsageError(f"--save_captions: {shown} is a link to nothing: delete it, or use --output")
        if self._overwrite and exists and not path.is_file():
            raise UsageError(f"--save_captions: {shown} is no file: move it away")
        return not exists

    def _find(self, image: Path) -> Path | None:
        """Return an image's caption file if it exists."""
        stems = [image.name] if self._twins.is_named_as_another(image) else [image.name, image.stem]
        paths = (image.with_name(stem + self._extension) for stem in stems)
        return next((path for path in paths if os.path.exists(path)), None)  # noqa: PTH110


class _Twins:
    """Finds images that share their stem with another image in their folder. Each folder is listed once."""

    def __init__(self) -> None:
        self._images: dict[Path, tuple[set[str], Counter[str]]] = {}

    def has(self, image: Path) -> bool:
        """Tell whether another image has this stem, or this stem as its full name."""
        _, stems = self._list(image.parent)
        return stems[image.stem] > 1 or self.is_named_as_another(image)

    def is_named_as_another(self, image: Path) -> bool:
        """Tell whether the stem is another image's full name, as for `a.png.webp` beside `a.png`."""
        names, _ = self._list(image.parent)
        return image.stem in names

    def _list(self, folder: Path) -> tuple[set[str], Counter[str]]:
        if folder not in self._images:
            images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
            self._images[folder] = {path.name for path in images}, Counter(path.stem for path in images)
        return self._images[folder]


def _encode(path: Path, text: str) -> bytes:
    try:
        refuse_odd_characters(text)
    except ValueError as error:
        raise CaptionTrainError(
            f"{escape_unprintable(path)}: the caption has {error}, which no caption file can hold"
        ) from None
    return f"{text}\n".encode()


def _read_theirs(caption: Caption, path: Path) -> Caption | None:
    """Return what somebody else has written; None if it cannot be read, or is still empty."""
    try:
        text = read_caption(path)
    except CaptionTrainError:
        return None
    return replace(caption, text=text, answer=None, remarks=()) if text else None

"""Writes captions to files beside the images and to one common file. No torch."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from caption_train.captioning.caption_file import CaptionFile
from caption_train.config.captioning import CaptionOptions
from caption_train.data.formats import IMAGE_SUFFIXES
from caption_train.data.text import read_caption
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.files import write_atomically


class Outputs:
    """All that `--save_captions` and `--output` ask for, as one process writes it.

    Args:
        options: the options of the run.
        rank: the rank of this process.
    """

    def __init__(self, options: CaptionOptions, rank: int = 0) -> None:
        self._extension = "." + options.caption_extension.lstrip(".")
        self._overwrite = options.overwrite
        self._saves = options.save_captions
        self._file = CaptionFile(options.output, rank) if options.output else None
        self._twins = _Twins()

    @property
    def exist(self) -> bool:
        """Whether captions are written to files; if not, they are only printed."""
        return self._saves or self._file is not None

    def find_pending(self, images: Sequence[Path]) -> list[Path]:
        """Return the images without a caption, or all with `--overwrite`. Call it once, before writing.

        A caption that only one of the two outputs has is copied to the other.

        Raises:
            UsageError: an output cannot be written; raised before any work is done.
            CaptionTrainError: another run is writing to the same file.
        """
        self._check_writable(images)
        if self._file is None and not self._saves:
            return list(images)
        if self._file:
            self._file.lock()
        try:
            return self._find_pending(images)
        except BaseException:
            self.close()
            raise

    def write(self, image: Path, text: str, *, answer: Any = None, remarks: Iterable[str] = ()) -> None:
        """Write one caption to all outputs; for `answer` and `remarks` see `CaptionFile.append`."""
        if self._saves:
            _write_caption(self.caption_path(image), text)
        if self._file:
            self._file.append(image, text, answer=answer, remarks=remarks)

    def finish(self, images: Sequence[Path], *, complete: bool = True) -> None:
        """Write the common file.

        Args:
            images: all images of the run, which give the order of rows.
            complete: False if other processes may still add captions.
        """
        if self._file:
            self._file.merge(images)
            if complete:
                self._file.discard_journals()

    def close(self) -> None:
        """Allow other runs to write to the common file."""
        if self._file:
            self._file.unlock()

    def caption_path(self, image: Path) -> Path:
        """Return the path of an image's caption file.

        >>> import tempfile
        >>> from caption_train.config.captioning import CaptionOptions
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat.png", "dog.png", "dog.jpg"):
        ...     (folder / name).touch()
        >>> outputs = Outputs(CaptionOptions(save_captions=True))
        >>> [outputs.caption_path(folder / name).name for name in ("cat.png", "dog.png", "dog.jpg")]
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

    def _find_pending(self, images: Sequence[Path]) -> list[Path]:
        if self._overwrite:
            if self._file:
                self._file.take_over()
            return list(images)
        captions = self._file.read() if self._file else {}
        return [image for image in images if not self._is_done(image, captions)]

    def _is_done(self, image: Path, captions: dict[str, str]) -> bool:
        text = captions.get(self._file.name_of(image)) if self._file else None
        path = self._existing_caption(image) if self._saves else None
        if self._saves and self._file:
            if path and text is None:
                self._file.append(image, read_caption(path))
            elif text is not None and path is None:
                _write_caption(self.caption_path(image), text)
        return path is not None or text is not None

    def _existing_caption(self, image: Path) -> Path | None:
        stems = [image.name] if self._twins.is_named_as_another(image) else [image.name, image.stem]
        paths = (image.with_name(stem + self._extension) for stem in stems)
        return next((path for path in paths if os.path.exists(path)), None)  # noqa: PTH110

    def _check_writable(self, images: Sequence[Path]) -> None:
        if self._extension.lower() in IMAGE_SUFFIXES:
            raise UsageError(f"--caption_extension {self._extension} would write over images")
        if self._file:
            folder = self._file.path.parent
            if not folder.is_dir():
                raise UsageError(f"--output {self._file.path}: there is no folder {folder}")
            if self._file.path.is_dir() or not os.access(folder, os.W_OK):
                raise UsageError(f"--output {self._file.path}: cannot be written there")
            for image in images:
                self._file.name_of(image)
        if self._saves:
            for folder in dict.fromkeys(image.parent for image in images):
                if not os.access(folder, os.W_OK):
                    raise UsageError(f"--save_captions: {folder} cannot be written to; use --output instead")


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


def wrap_caption(text: str, *, prefix: str = "", suffix: str = "", trigger: str | None = None) -> str:
    """Put prefix, suffix and trigger around a caption.

    >>> wrap_caption("a cat", prefix="photo of ", trigger="mystyle")
    'mystyle, photo of a cat'
    >>> wrap_caption("a mystyle cat", trigger="mystyle")
    'a mystyle cat'

    Args:
        text: the caption.
        prefix: put before it, without a space.
        suffix: put after it, without a space.
        trigger: put first with a comma, unless it is a word of the text already.
    """
    text = f"{prefix}{text}{suffix}".strip()
    if not trigger or f" {trigger} " in f" {text.replace(',', ' ')} ":
        return text
    return f"{trigger}, {text}" if text else trigger


def _write_caption(path: Path, text: str) -> None:
    try:
        write_atomically(path, text + "\n")
    except OSError as error:
        raise CaptionTrainError(f"{path}: cannot be written: {error.strerror or error}") from error

"""Where captions go: files beside the images, one file for all, the terminal. No torch."""

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
    """All that `--save_captions` and `--output` ask for, as one process writes it."""

    def __init__(self, options: CaptionOptions, rank: int = 0) -> None:
        self._extension = "." + options.caption_extension.lstrip(".")
        self._overwrite = options.overwrite
        self._saves = options.save_captions
        self._file = CaptionFile(options.output, rank) if options.output else None
        self._twins = _Twins()

    @property
    def exist(self) -> bool:
        """False when captions only go to the terminal."""
        return self._saves or self._file is not None

    def find_pending(self, images: Sequence[Path]) -> list[Path]:
        """Return the images without a caption, all of them under `--overwrite`; call it once, before writing.

        A caption that only one of the two outputs has is copied to the other. Raises UsageError where nothing
        can be written, before any work is done, and CaptionTrainError where another run is at the same file.
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
        """Put one caption where it goes."""
        if self._saves:
            _write_caption(self.caption_path(image), text)
        if self._file:
            self._file.append(image, text, answer=answer, remarks=remarks)

    def finish(self, images: Sequence[Path], *, complete: bool = True) -> None:
        """Write the one file, in the order of `images`; unless `complete`, others may yet add to it."""
        if self._file:
            self._file.merge(images)
            if complete:
                self._file.discard_journals()

    def close(self) -> None:
        """Let other runs write to the one file."""
        if self._file:
            self._file.unlock()

    def caption_path(self, image: Path) -> Path:
        """Return where an image's caption goes: `a.txt`; `a.png.txt` if that exists or there is an `a.jpg`.

        Training reads `a.png.txt` before `a.txt` too. So `a.png.webp` beside `a.png` gets `a.png.webp.txt`.
        """
        full = image.with_name(image.name + self._extension)
        # os.path's test is False for what is too long for a name, too; Path's raises.
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
    """Which images do not have their stem to themselves in their folder. Each folder is listed once."""

    def __init__(self) -> None:
        self._images: dict[Path, tuple[set[str], Counter[str]]] = {}

    def has(self, image: Path) -> bool:
        """Tell whether there is another image of this stem, or one whose name it is."""
        _, stems = self._list(image.parent)
        return stems[image.stem] > 1 or self.is_named_as_another(image)

    def is_named_as_another(self, image: Path) -> bool:
        """Tell whether the stem is another image's name, as for `a.png.webp` beside `a.png`."""
        names, _ = self._list(image.parent)
        return image.stem in names

    def _list(self, folder: Path) -> tuple[set[str], Counter[str]]:
        if folder not in self._images:
            images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
            self._images[folder] = {path.name for path in images}, Counter(path.stem for path in images)
        return self._images[folder]


def wrap_caption(text: str, *, prefix: str = "", suffix: str = "", trigger: str | None = None) -> str:
    """Return prefix, caption and suffix as given, after `trigger, ` unless the trigger is a word of them."""
    text = f"{prefix}{text}{suffix}".strip()
    if not trigger or f" {trigger} " in f" {text.replace(',', ' ')} ":
        return text
    return f"{trigger}, {text}" if text else trigger


def _write_caption(path: Path, text: str) -> None:
    try:
        write_atomically(path, text + "\n")
    except OSError as error:
        raise CaptionTrainError(f"{path}: cannot be written: {error.strerror or error}") from error

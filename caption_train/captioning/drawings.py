"""Saves copies of the captioned images with their answers drawn on them."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from caption_train.data.formats import IMAGE_SUFFIXES
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


class Drawings:
    """The folder of `--visualize`, with the same names, subfolders and formats as the images.

    Raises UsageError if a drawing would replace one of the images.
    """

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self.folder = folder
        self._root = Path(os.path.commonpath([image.absolute().parent for image in images] or ["/"]))
        real = cache(os.path.realpath)
        originals = {(real(image.parent), image.name) for image in images}
        for path in map(self.path, images):
            if (real(path.parent), path.name) in originals:
                raise UsageError(
                    f"--visualize {folder}: would replace the images there, such as "
                    f"{escape_unprintable(path)}; name another folder"
                )

    def path(self, image: Path) -> Path:
        """Return where the drawing of an image is saved."""
        path = self.folder / image.absolute().relative_to(self._root)
        return path if path.suffix.lower() in IMAGE_SUFFIXES else path.with_name(path.name + ".png")

    def save(self, image: Path, draw: Callable[["Image"], "Image"]) -> None:
        """Open an image, draw on it with `draw`, and save the result."""
        from PIL.Image import registered_extensions

        from caption_train.data.images import open_image

        path, drawing = self.path(image), draw(open_image(image))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_atomically(path, "wb") as file:
                drawing.save(file, format=registered_extensions()[path.suffix.lower()])
        except OSError as error:
            raise CaptionTrainError(f"--visualize {path}: {error.strerror or error}") from error

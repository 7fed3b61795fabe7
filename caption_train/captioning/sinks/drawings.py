"""Saves copies of the captioned images with their answers drawn on them."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.captioning.outputs import Caption, Sink
from caption_train.captioning.storage.image_list import ImageList, folders_of
from caption_train.data.formats import IMAGE_SUFFIXES
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_atomically

if TYPE_CHECKING:
    from PIL.Image import Image


class Drawings(Sink):
    """The folder of `--visualize`, with the same names, subfolders and formats as the images.

    Args:
        folder: gets the drawings.
        draw: draws an answer on an image; a family's `draw_answer`.
    """

    keeps_captions = False

    def __init__(self, folder: Path, draw: Callable[["Image", Any], "Image"]) -> None:
        self.folder = folder
        self._draw = draw
        self._root = Path("/")

    def open(self, images: Sequence[Path]) -> None:
        """Find the folder that holds all images; raise UsageError if a drawing would replace one of them."""
        self.begin(images)
        real = cache(os.path.realpath)
        folders = {real(folder) for folder in folders_of(images)}
        drawn = (self.path(image) for image in images)
        if all(real(self.path(folder / "_.png").parent) not in folders for folder in folders_of(images)):
            return
        originals = {(real(image.parent), image.name) for image in images}
        for path in drawn:
            if (real(path.parent), path.name) in originals:
                raise UsageError(
                    f"--visualize {self.folder}: would replace the images there, such as "
                    f"{escape_unprintable(path)}; name another folder"
                )

    def find_lacking(self, images: Sequence[Path]) -> list[Path]:
        """Return all images, since old drawings are replaced."""
        return list(images)

    def begin(self, images: Sequence[Path]) -> None:
        """Find the folder that holds all images."""
        folders = images.given_folders if isinstance(images, ImageList) else folders_of(images)
        self._root = Path(os.path.commonpath([folder.absolute() for folder in folders] or ["/"]))

    def read(self, image: Path) -> str:
        """Raise NotImplementedError: a drawing is no caption."""
        raise NotImplementedError

    def path(self, image: Path) -> Path:
        """Return where the drawing of an image is saved."""
        path = self.folder / image.absolute().relative_to(self._root)
        return path if path.suffix.lower() in IMAGE_SUFFIXES else path.with_name(path.name + ".png")

    def write(self, caption: Caption) -> Caption:
        """Save a copy of the image with the answer drawn on it, if there is an answer."""
        if caption.answer is not None:
            self._save(caption.image, caption.answer)
        return caption

    def _save(self, image: Path, answer: Any) -> None:
        from PIL.Image import registered_extensions

        from caption_train.data.images import open_image

        path, drawing = self.path(image), self._draw(open_image(image), answer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_atomically(path, "wb") as file:
                drawing.save(file, format=registered_extensions()[path.suffix.lower()])
        except OSError as error:
            raise CaptionTrainError(
                f"--visualize {escape_unprintable(path)}: {error.strerror or error}"
            ) from error

"""Opens and encodes images for captioning, in the processes that work ahead of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from caption_train.data.images import ImageError, normalize_image, open_image, open_measured
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.features.source import FeatureSource, attach_rows
from caption_train.system.console import escape_unprintable
from caption_train.system.workers import hand_over


class ImageFiles(Dataset):
    """Images as `{"path", "size", "image"}`, or `{"path", "error"}` for what cannot be read.

    The path of an image in memory is `image N`, counted from `first`. With `prompts`, an item has its
    `"prompt"` too, and with a `source`, what that says of its features; its size is unknown then. With
    `at_least`, a JPEG file may be decoded at a fraction of its size, both sides of at least so many pixels.
    """

    def __init__(
        self,
        paths: Sequence[Path | Image.Image],
        prompts: Sequence[str] | None = None,
        source: FeatureSource | None = None,
        first: int = 0,
        at_least: int | None = None,
    ) -> None:
        self.paths = paths
        self.prompts = prompts
        self.source = source
        self.first = first
        self.at_least = at_least

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = self.paths[index]
        in_memory = isinstance(given, Image.Image)
        path = Path(f"image {self.first + index}") if in_memory else given
        try:
            if self.source and not in_memory:
                return self._add_prompt(index, {"path": path, "size": (0, 0)} | self.source.open(path))
            image, size = self._open(given)
        except ImageError as error:
            # The message of a file begins with its path.
            return {"path": path, "error": f"{path}: {error}" if in_memory else str(error)}
        return self._add_prompt(index, {"path": path, "size": size, "image": image})

    def _open(self, given: Path | Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """Return an image, and its size in full."""
        if self.at_least and not isinstance(given, Image.Image):
            return open_measured(given, at_least=self.at_least)[:2]
        image = normalize_image(given.copy()) if isinstance(given, Image.Image) else open_image(given)
        return image, image.size

    def _add_prompt(self, index: int, item: dict[str, Any]) -> dict[str, Any]:
        return item if self.prompts is None else item | {"prompt": self.prompts[index]}


@dataclass
class Encode:
    """Turns items of ImageFiles into `inputs` by the family's `encode`, and `items` without pixels."""

    family: Family
    processor: Any
    prompt: str

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        try:
            inputs = self._encode(items)
        except CaptionTrainError as error:
            # Returned: an error raised in a worker arrives with the worker's traceback in its message.
            return {"items": items, "inputs": {}, "error": error}
        finally:
            for item in items:
                item.pop("image", None)
                item.pop("features", None)
        return {"items": items, "inputs": hand_over(inputs), "error": None}

    def _encode(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the model's inputs of all items with an image; what the family refuses gets an error."""
        good = [item for item in items if "image" in item]
        images, prompts = [item["image"] for item in good], [self._prompt_of(item) for item in good]
        try:
            inputs = self.family.encode(self.processor, images, prompts) if images else {}
            return attach_rows(self.family, inputs, good) if good and "digest" in good[0] else inputs
        except CaptionTrainError as error:
            # A prompt of the run is wrong for all images, one of an image for that image.
            if isinstance(error, UsageError) and all(prompt == self.prompt for prompt in prompts):
                raise
            found = ((index, self._try(item)) for index, item in enumerate(items))
            refused = {index: error for index, error in found if error}
            if not refused:
                raise
        for index, error in refused.items():
            del items[index]["image"]
            items[index]["error"] = f"{escape_unprintable(items[index]['path'])}: {error}"
        return self._encode(items)

    def _try(self, item: dict[str, Any]) -> CaptionTrainError | None:
        """Return why the family refuses an item alone."""
        if "image" not in item:
            return None
        try:
            self.family.encode(self.processor, [item["image"]], [self._prompt_of(item)])
        except CaptionTrainError as error:
            return error
        return None

    def _prompt_of(self, item: dict[str, Any]) -> str:
        return item.get("prompt", self.prompt)

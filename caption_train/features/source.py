"""Opens images for training and captioning, or takes their kept features in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from caption_train.data.images import open_image
from caption_train.families.base import Batch, Family
from caption_train.features.encoder import ROWS, KeepingEncoder, Rows
from caption_train.features.store import FeatureStore
from caption_train.system.files import hash_file


@dataclass
class FeatureSource:
    """Gives an item the kept features of its image, or the image where there are none; it can be pickled.

    Attributes:
        store: where features are kept.
        digests: image → SHA-256 of the file when it was checked.
    """

    store: FeatureStore
    digests: Mapping[Path, str]

    def open(self, path: Path) -> dict[str, Any]:
        """Return what an item says of its image.

        Returns:
            `{"image", "digest"}`, where the digest is None for a file that has changed since it was checked:
            its features are not kept under the old name. With kept features, these are `"features"`, and the
            image is a blank one, for the collator.

        Raises:
            ImageError: there are no features, and the file cannot be read.
        """
        digest = self.digests.get(path)
        features = self.store.read(digest) if digest else None
        if features is not None:
            return {"image": Image.new("RGB", (32, 32)), "digest": digest, "features": features}
        image = open_image(path)
        return {"image": image, "digest": digest if digest and _is_unchanged(path, digest) else None}


def _is_unchanged(path: Path, digest: str) -> bool:
    try:
        return hash_file(path) == digest
    except OSError:
        return False


def attach_rows(family: Family, batch: Batch, items: Sequence[Mapping[str, Any]]) -> Batch:
    """Return a batch whose images with kept features have no pixels any more; its `feature_rows` has them.

    Args:
        family: the model's family.
        batch: what the family made of the items.
        items: made by `FeatureSource.open`; others, such as fillers, are encoded and not kept.
    """
    kept = [place for place, item in enumerate(items) if "features" in item]
    missing = [place for place, item in enumerate(items) if "features" not in item]
    features = torch.stack([items[place]["features"] for place in kept]) if kept else None
    rows = Rows([item.get("digest") for item in items], kept, features)
    return family.keep_images(batch, missing) | {ROWS: rows}


@dataclass
class Keeping:
    """The two ends of kept features in one process: the model's encoder, and what opens images for it."""

    encoder: KeepingEncoder
    source: FeatureSource


@dataclass
class FeatureCollator:
    """A family's collator whose batches have `feature_rows`; it can be pickled."""

    family: Family
    collate_fn: Callable[[Sequence[dict]], Batch]

    def __call__(self, items: Sequence[dict]) -> Batch:
        return attach_rows(self.family, self.collate_fn(items), items)

"""Opens images for training and captioning, or takes their kept features in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.data.images import open_image
from caption_train.families.base import Batch, Family
from caption_train.families.image_encoder import SINGLES
from caption_train.features.encoder import KeepingEncoder
from caption_train.features.rows import ROWS, Rows, pack
from caption_train.features.store import FeatureStore
from caption_train.system.files import hash_file


@dataclass
class FeatureSource:
    """Gives an item the kept features of its image, or the image where there are none; it can be pickled.

    Attributes:
        store: where features are kept.
        digests: image → SHA-256 of the file when it was checked.
        family: the model's family.
    """

    store: FeatureStore
    digests: Mapping[Path, str]
    family: Family

    def open(self, path: Path) -> dict[str, Any]:
        """Return what an item says of its image.

        Returns:
            `{"image", "digest"}`, where the digest is None for a file that has changed since it was checked:
            its features are not kept under the old name. With kept features, these are `"features"`, and the
            image is not opened: see `Family.hold_image`.

        Raises:
            ImageError: there are no features, and the file cannot be read.
        """
        digest = self.digests.get(path)
        features = self.store.read(digest) if digest else None
        if features is not None:
            image = self.family.hold_image(path, None, features)
            return {"image": image, "digest": digest, "features": features}
        image = self.family.hold_image(path, open_image(path), {})
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
    batch, inputs = dict(batch), None
    digests = [item.get("digest") for item in items]
    kept = [place for place, item in enumerate(items) if "features" in item]
    if (singles := batch.pop(SINGLES, None)) is not None:
        kept = [place for place, single in enumerate(singles) if single is None]
        digests = [d if s is None or s.is_whole else None for d, s in zip(digests, singles, strict=True)]
        inputs = pack([single.inputs for single in singles if single is not None])
    else:
        batch = family.keep_images(batch, [place for place in range(len(items)) if place not in kept])
    features = pack([items[place]["features"] for place in kept])
    return batch | {ROWS: Rows(digests, [item["image"].size for item in items], kept, features, inputs)}


@dataclass
class Keeping:
    """The two ends of kept features in one process: the model's encoder, and what opens images for it."""

    encoder: KeepingEncoder
    source: FeatureSource

    def make_batch(self, collate_fn: Callable[[Sequence[dict]], Batch], items: Sequence[dict]) -> Batch:
        """Return a batch of items with an opened `"image"` each, whose features are not kept."""
        hold = self.source.family.hold_image
        items = [item | {"image": hold(Path(), item["image"], {})} for item in items]
        return attach_rows(self.source.family, collate_fn(items), items)


@dataclass
class FeatureCollator:
    """A family's collator whose batches have `feature_rows`; it can be pickled."""

    family: Family
    collate_fn: Callable[[Sequence[dict]], Batch]

    def __call__(self, items: Sequence[dict]) -> Batch:
        return attach_rows(self.family, self.collate_fn(items), items)

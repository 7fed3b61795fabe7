"""Splits a dataset by the content of its images, and computes its fingerprint."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from caption_train.data.pairs import Pair
from caption_train.packed import PackedFile
from caption_train.system.files import hash_file


def split_by_content(
    pairs: Sequence[Pair], fraction: float, seed: int, digests: Mapping[Path, str] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training and validation by the content of their images.

    Pairs of byte-identical images stay together. Images are ranked by a hash of the seed and their bytes, so
    the split depends on the images and the seed alone, not on names, order or captions.

    Args:
        pairs: the pairs to split.
        fraction: about how many of the pairs go to validation, 0-1.
        seed: another seed makes another split.
        digests: image → SHA-256, if they are known already; otherwise the files are read.

    Returns:
        (training pairs, validation pairs), each in the given order.
    """
    digests = digests or {image: _digest(image) for image in {pair.image for pair in pairs}}
    groups = Counter(digests[pair.image] for pair in pairs)
    ranked = rank_images(groups, seed)
    target, taken, chosen = min(round(fraction * len(pairs)), len(pairs) - 1), 0, set()
    for digest in ranked:
        if taken + groups[digest] <= target:
            chosen.add(digest)
            taken += groups[digest]
    # Every group is larger than the target: take the smallest, so that validation is not empty.
    if not chosen and fraction > 0 and len(ranked) > 1:
        chosen = {min(ranked, key=lambda digest: groups[digest])}
    return (
        [pair for pair in pairs if digests[pair.image] not in chosen],
        [pair for pair in pairs if digests[pair.image] in chosen],
    )


def rank_images(digests: Iterable[str], seed: int) -> list[str]:
    """Return the digests of images, each once, in an order that depends on the seed and the digests alone.

    A split holds out the first ones; previews and metrics look at the first ones of those.
    """
    return sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())


def pick_images(pairs: Sequence[Pair], seed: int, digests: Mapping[Path, str]) -> list[Pair]:
    """Return the first pair of each image, in the order of `rank_images`; copies of an image are one image.

    Args:
        pairs: the pairs to choose from.
        seed: another seed gives another order.
        digests: image → SHA-256 of its bytes.
    """
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(digests[pair.image], pair)
    return [first[digest] for digest in rank_images(first, seed)]


def drop_repeats(pairs: Sequence[Pair], digests: Mapping[Path, str]) -> list[Pair]:
    """Return the pairs, in order, without those whose image, caption and prompt an earlier one has already.

    Kohya's folders `10_name` repeat every row, which is meant for training only.

    Args:
        pairs: the pairs to choose from.
        digests: image → SHA-256 of its bytes.
    """
    kept: dict[tuple[str, str, str | None], Pair] = {}
    for pair in pairs:
        kept.setdefault((digests[pair.image], pair.caption, pair.prompt), pair)
    return list(kept.values())


def fingerprint(pairs: Sequence[Pair], digests: Mapping[Path, str]) -> str:
    """Return a hash of the dataset's file names, image bytes, captions, splits and prompts.

    The order of the pairs and the folder that holds them do not matter.

    Args:
        pairs: the pairs of the dataset.
        digests: image → SHA-256 of its bytes.

    Returns:
        A SHA-256 in hexadecimal.
    """
    if not pairs:
        return hashlib.sha256().hexdigest()
    rows = sorted(
        (name, digests[pair.image], pair.caption, pair.split)
        # Only if there is one, so that datasets without prompts keep the fingerprint they always had.
        + ((pair.prompt,) if pair.prompt else ())
        for name, pair in zip(name_images(pairs), pairs, strict=True)
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def name_images(pairs: Sequence[Pair]) -> list[str]:
    """Return each pair's image relative to the innermost folder that holds all of them.

    >>> name_images([Pair(Path(f"/data/{name}"), "a cat", "") for name in ("in/a.png", "in/b/a.png")])
    ['a.png', 'b/a.png']
    """
    # What is inside of a tar has the name that it had in the folder that was packed.
    images = [pair.image.unpacked if isinstance(pair.image, PackedFile) else pair.image for pair in pairs]
    places = [os.path.split(image) for image in images]
    # Each folder once: thousands of images lie in the same few.
    folders = dict.fromkeys(folder for folder, _ in places)
    root = os.path.commonpath([Path(folder).absolute() for folder in folders])
    inner = {folder: os.path.relpath(folder or os.curdir, root) for folder in folders}
    start = {folder: "" if way == os.curdir else way + os.sep for folder, way in inner.items()}
    return [start[folder] + name for folder, name in places]


def _digest(image: Path) -> str:
    try:
        return hash_file(image)
    except OSError:
        # A digest of its own, so that no other image joins it. Opening the image reports the error.
        return f"unreadable {image}"

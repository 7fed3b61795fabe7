"""Splits a dataset by the content of its images, and computes its fingerprint."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from caption_train.data.columns.table import Pairs
from caption_train.data.pairs import Pair
from caption_train.system.files import hash_file

_AT_ONCE = 2000


def split_by_content(
    pairs: Sequence[Pair], fraction: float, seed: int, digests: Mapping[Path, str] | None = None
) -> tuple[Sequence[Pair], Sequence[Pair]]:
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
    of_pair = list(_list_digests(pairs, digests))
    groups = Counter(of_pair)
    ranked = rank_images(groups, seed)
    target, taken, chosen = min(round(fraction * len(pairs)), len(pairs) - 1), 0, set()
    for digest in ranked:
        if taken + groups[digest] <= target:
            chosen.add(digest)
            taken += groups[digest]
    # Every group is larger than the target: take the smallest, so that validation is not empty.
    if not chosen and fraction > 0 and len(ranked) > 1:
        chosen = {min(ranked, key=lambda digest: groups[digest])}
    is_held_out = [digest in chosen for digest in of_pair]
    return _choose(pairs, [not held for held in is_held_out]), _choose(pairs, is_held_out)


def _list_digests(pairs: Sequence[Pair], digests: Mapping[Path, str] | None) -> Iterable[str]:
    """Return the digest of each pair's image; pairs in columns have them, of others the files are read."""
    if digests is None and isinstance(pairs, Pairs):
        return pairs.digests()
    digests = digests or {image: _digest(image) for image in {pair.image for pair in pairs}}
    return [digests[pair.image] for pair in pairs]


def _choose(pairs: Sequence[Pair], wanted: Sequence[bool]) -> Sequence[Pair]:
    if isinstance(pairs, Pairs):
        return pairs.keep(np.array(wanted, bool))
    return list(compress(pairs, wanted))


def rank_images(digests: Iterable[str], seed: int) -> list[str]:
    """Return the digests of images, each once, in an order that depends on the seed and the digests alone.

    A split holds out the first ones; previews and metrics look at the first ones of those.
    """
    return sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())


def pick_images(pairs: Sequence[Pair], seed: int, digests: Mapping[Path, str] | None = None) -> list[int]:
    """Return where the first pair of each image is, in the order of `rank_images`; copies are one image.

    Args:
        pairs: the pairs to choose from.
        seed: another seed gives another order.
        digests: image → SHA-256 of its bytes; of pairs in columns, these are in them.
    """
    first: dict[str, int] = {}
    for place, digest in enumerate(_list_digests(pairs, digests)):
        first.setdefault(digest, place)
    return [first[digest] for digest in rank_images(first, seed)]


def drop_repeats(pairs: Pairs) -> Pairs:
    """Return the pairs, in order, without those whose image, caption and prompt an earlier one has already.

    Kohya's folders `10_name` repeat every row, which is meant for training only.
    """
    seen: set[tuple[str, str, str | None]] = set()
    wanted = np.zeros(len(pairs), bool)
    rows = zip(pairs.digests(), pairs.captions(), pairs.prompts(), strict=True)
    for place, row in enumerate(rows):
        wanted[place] = row not in seen
        seen.add(row)
    return pairs.keep(wanted)


def fingerprint(pairs: Sequence[Pair], digests: Mapping[Path, str] | None = None) -> str:
    """Return a hash of the dataset's file names, image bytes, captions, splits and prompts.

    The order of the pairs and the folder that holds them do not matter.

    Args:
        pairs: the pairs of the dataset.
        digests: image → SHA-256 of its bytes; of pairs in columns, these are in them.

    Returns:
        A SHA-256 in hexadecimal.
    """
    pairs = pairs if isinstance(pairs, Pairs) else Pairs.of(pairs, digests)
    return fingerprint_named(pairs, name_images(pairs) if pairs else [])


def fingerprint_named(pairs: Pairs, names: Sequence[str]) -> str:
    """Return the `fingerprint` of pairs whose images have these names, as `name_images` gives them."""
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    # That of json.dumps(rows), in which rows are lists, without a string of all of them.
    total, start = hashlib.sha256(), 0
    while start < len(order):
        end = min(start + _AT_ONCE, len(order))
        while end < len(order) and names[order[end]] == names[order[end - 1]]:
            end += 1
        some = Pairs(pairs.table, pairs.rows[order[start:end]])
        rows = sorted(
            # A prompt only if there is one, so that datasets without keep the fingerprint they always had.
            (names[number], digest, caption, split) + ((prompt,) if prompt else ())
            for number, digest, caption, split, prompt in zip(
                order[start:end].tolist(),
                some.digests(),
                some.captions(),
                some.splits(),
                some.prompts(),
                strict=True,
            )
        )
        total.update((("[" if start == 0 else ", ") + json.dumps(rows)[1:-1]).encode())
        start = end
    total.update(b"]" if len(order) else b"")
    return total.hexdigest()


def name_images(pairs: Sequence[Pair]) -> list[str]:
    """Return each pair's image relative to the innermost folder that holds all of them.

    >>> name_images([Pair(Path(f"/data/{name}"), "a cat", "") for name in ("in/a.png", "in/b/a.png")])
    ['a.png', 'b/a.png']
    """
    # What is inside of a tar has the name that it had in the folder that was packed.
    if isinstance(pairs, Pairs):
        images = pairs.image_names(unpacked=True)
    else:
        images = (str(getattr(pair.image, "unpacked", pair.image)) for pair in pairs)
    # Each folder once: thousands of images lie in the same few.
    folders: dict[str, str] = {}
    places = []
    for image in images:
        folder, _, name = image.rpartition(os.sep)
        if not folder.strip(os.sep) or os.name == "nt":
            folder, name = os.path.split(image)
        places.append((folders.setdefault(folder, folder), name))
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

"""Splits a dataset by the content of its images, and fingerprints it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from caption_train.data.pairs import Pair
from caption_train.system.files import hash_file


def split_by_content(
    pairs: Sequence[Pair], fraction: float, seed: int, digests: Mapping[Path, str] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Return (training, validation) pairs, each in the given order, about `fraction` of them in validation.

    Pairs of byte-identical images stay together. Images are ranked by a hash of the seed and their bytes, so
    the split depends on nothing but the images and the seed: not on names, order or captions.
    digests: the images' SHA-256, where they are known already.
    """
    digests = digests or {image: _digest(image) for image in {pair.image for pair in pairs}}
    groups = Counter(digests[pair.image] for pair in pairs)
    ranked = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    target, taken, chosen = min(round(fraction * len(pairs)), len(pairs) - 1), 0, set()
    for digest in ranked:
        if taken + groups[digest] <= target:
            chosen.add(digest)
            taken += groups[digest]
    if not chosen and fraction > 0 and len(ranked) > 1:
        chosen = {min(ranked, key=lambda digest: groups[digest])}
    return (
        [pair for pair in pairs if digests[pair.image] not in chosen],
        [pair for pair in pairs if digests[pair.image] in chosen],
    )


def fingerprint(pairs: Sequence[Pair], digests: Mapping[Path, str]) -> str:
    """Return a hash of names, digests, captions, prompts: the same wherever the data lies, in any order."""
    if not pairs:
        return hashlib.sha256().hexdigest()
    root = os.path.commonpath([pair.image.parent.absolute() for pair in pairs])
    rows = sorted(
        (os.path.relpath(pair.image, root), digests[pair.image], pair.caption, pair.split)
        + ((pair.prompt,) if pair.prompt else ())
        for pair in pairs
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _digest(image: Path) -> str:
    try:
        return hash_file(image)
    except OSError:
        # Alone in its group; whoever opens the image reports it.
        return f"unreadable {image}"

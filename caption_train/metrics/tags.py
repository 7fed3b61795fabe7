"""Compares captions that are lists of tags, "1girl, solo, long hair", tag by tag. Standard library only."""

import statistics
from collections.abc import Sequence

MOST_WORDS = 4
"""More words than this between two commas are a clause, not a tag."""


def split_tags(caption: str) -> list[str]:
    """Return the tags of a caption, each once: lower case, white space evened out.

    >>> split_tags("Solo, long  hair, solo,")
    ['solo', 'long hair']
    """
    tags = (" ".join(part.split()).casefold() for part in caption.split(","))
    return list(dict.fromkeys(tag for tag in tags if tag))


def are_tags(captions: Sequence[str]) -> bool:
    """Tell whether captions are lists of tags: most have commas, with few words between them.

    >>> are_tags(["solo, long hair", "red, large"]), are_tags(["a dog, which runs after the red ball"])
    (True, False)
    """
    parts = [caption.split(",") for caption in captions if caption.strip()]
    if not parts or sum(len(part) > 1 for part in parts) * 2 < len(parts):
        return False
    return statistics.median(max(len(tag.split()) for tag in part) for part in parts) <= MOST_WORDS


def count_tags(generated: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return (tags that are right, tags generated, tags of the reference) of each of N captions.

    Of several references, the one that the caption shares the greatest part with counts.
    """
    rows = []
    for caption, refs in zip(generated, references, strict=True):
        tags = set(split_tags(caption))
        counts = [(len(tags & ref), len(tags), len(ref)) for ref in (set(split_tags(ref)) for ref in refs)]
        rows.append(list(max(counts, key=lambda row: row[0] / max(row[1] + row[2], 1))))
    return rows

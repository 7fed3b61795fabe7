"""Finds what is odd in a dataset although it can be used: copies that disagree, tokens in captions."""

from collections.abc import Mapping, Sequence

from caption_train.data.copies import find_copies
from caption_train.data.pairs import Pair
from caption_train.data.text import TOKEN_NAMES


def find_token_like(pairs: Mapping[str, Sequence[Pair]]) -> list[str]:
    """Return a line for each caption that spells out a control token of some model, with what it spells.

    Tools that decode with special tokens leave them behind. Training reads them as text, and a model then
    learns to write them.

    >>> from pathlib import Path
    >>> find_token_like({"a.png": [Pair(Path("a.png"), "a cat</s>", "a.txt")]})
    ['a.png: </s>']
    """
    found = (
        (name, dict.fromkeys(token for pair in several for token in TOKEN_NAMES.findall(pair.caption)))
        for name, several in pairs.items()
    )
    return [f"{name}: {' '.join(tokens)}" for name, tokens in found if tokens]


def find_disagreeing(pairs: Mapping[str, Pair]) -> list[str]:
    """Return a line for each group of byte-identical images whose captions differ."""
    groups: dict[str, list[str]] = {}
    for name, digest in find_copies({name: pair.image for name, pair in pairs.items()}).items():
        groups.setdefault(digest, []).append(name)
    return [
        ", ".join(_show(pairs[name], name) for name in names)
        for names in groups.values()
        if len({pairs[name].caption for name in names}) > 1
    ]


def _show(pair: Pair, name: str) -> str:
    caption = pair.caption if len(pair.caption) <= _SHOWN else pair.caption[: _SHOWN - 1] + "…"
    return f"{name} ({caption})"


_SHOWN = 40

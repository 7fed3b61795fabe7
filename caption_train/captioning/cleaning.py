"""Cleans captions of what models add to them: `--clean`. Standard library only."""

import re
from collections.abc import Sequence

from caption_train.config.captioning import CLEANERS
from caption_train.data.text import TOKEN_NAMES, join_lines

_SENTENCE = re.compile(r".*?(?:[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[」』）]*)", re.DOTALL)
_NO_END = re.compile(r"(?:\b(?:mr|mrs|ms|dr|st|vs|no|e\.g|i\.e|approx|ca)|\b[A-Z])\.$", re.IGNORECASE)


def clean_caption(text: str, cleaners: Sequence[str]) -> str:
    """Return a caption, cleaned; the order of `cleaners` does not matter.

    >>> clean_caption("a cat</s>, a mat, A cat", ["strip_special", "dedupe_tags"])
    'a cat, a mat'
    >>> clean_caption("A cat of Mr. Smith. It sleeps.", ["first_sentence"])
    'A cat of Mr. Smith.'

    Args:
        text: the caption.
        cleaners: names from CLEANERS.
    """
    for name in CLEANERS:
        if name in cleaners:
            text = _CLEANERS[name](text)
    return text


def _strip_special(text: str) -> str:
    return (
        re.sub(r"[^\S\n]{2,}", " ", TOKEN_NAMES.sub(" ", text)).replace(" ,", ",").replace(" .", ".").strip()
    )


def _take_first_sentence(text: str) -> str:
    start = 0
    while found := _SENTENCE.match(text, start):
        if not _NO_END.search(text[: found.end()]):
            return text[: found.end()].strip()
        start = found.end()
    return text


def _drop_repeated_tags(text: str) -> str:
    """Return comma-separated tags, each as it is written first."""
    tags: dict[str, str] = {}
    for tag in map(str.strip, text.split(",")):
        tags.setdefault(tag.casefold(), tag)
    return ", ".join(filter(None, tags.values()))


_CLEANERS = {
    "strip_special": _strip_special,
    "one_line": join_lines,
    "first_sentence": _take_first_sentence,
    "dedupe_tags": _drop_repeated_tags,
}

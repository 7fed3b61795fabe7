"""What the page asks for: filters over the images, and find and replace in captions."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from caption_train.errors import UsageError

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Query:
    """Which images to show; those that fulfil all of it.

    Attributes:
        contains: the caption contains this text, upper and lower case being equal.
        tag: one of the caption's comma-separated tags is this.
        state: "", "empty" (no caption), "flagged", "changed", "accepted", "open" (not accepted), "copies"
            (images that are there several times, together) or "problem".
        longer_than: the caption has more words or tokens than this.
        unit: "words" or "tokens".
    """

    contains: str = ""
    tag: str = ""
    state: str = ""
    longer_than: int | None = None
    unit: str = "words"

    @classmethod
    def read(cls, values: Mapping[str, str]) -> "Query":
        """Read a query from the parameters of an address.

        Raises:
            UsageError: a value is not one that there is.
        """
        state, unit, longer = values.get("state", ""), values.get("unit", "words"), values.get("longer_than")
        if state not in STATES or unit not in ("words", "tokens"):
            raise UsageError("there is no such filter")
        if longer and not re.fullmatch("[0-9]{1,6}", longer):
            raise UsageError("longer than: give a whole number")
        return cls(
            values.get("contains", ""), values.get("tag", ""), state, int(longer) if longer else None, unit
        )


STATES = ("", "empty", "flagged", "changed", "accepted", "open", "copies", "problem")


def count_words(text: str) -> int:
    """Return how many words a caption has."""
    return len(text.split())


def split_tags(text: str) -> list[str]:
    """Return the comma-separated tags of a caption.

    >>> split_tags("a cat, on a  mat,, blue")
    ['a cat', 'on a mat', 'blue']
    """
    return [tag for part in text.split(",") if (tag := _SPACES.sub(" ", part.strip()))]


def count_tags(captions: Iterable[str]) -> Counter[str]:
    """Return in how many captions each tag is."""
    return Counter(tag for text in captions for tag in dict.fromkeys(split_tags(text)))


@dataclass(frozen=True)
class Replacement:
    """Find and replace.

    Attributes:
        find: the text to find, as it stands.
        replace: what to put there.
        match_case: whether upper and lower case differ.
        whole_words: whether `find` must begin and end at the edges of words.
    """

    find: str
    replace: str
    match_case: bool = True
    whole_words: bool = False

    def apply(self, text: str) -> str:
        """Return a caption with all places replaced.

        >>> Replacement("cat", "dog", whole_words=True).apply("cat, catalogue, a cat")
        'dog, catalogue, a dog'
        """
        pattern = re.escape(self.find)
        if self.whole_words:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        flags = re.NOFLAG if self.match_case else re.IGNORECASE
        # A function, because in a string `\1` would mean a group.
        return re.sub(pattern, lambda _: self.replace, text, flags=flags)

"""Finds captions that were cut, are empty or repeat themselves."""

from collections.abc import Sequence

from caption_train.families.base import Generated

REMARKS = {
    "cut": "reached the token limit without an end (--max_token_length)",
    "empty": "came out empty",
    "repeats": "repeat themselves",
}


def find_remarks(generated: Generated) -> list[str]:
    """Return the keys of REMARKS that apply to a caption."""
    applies = {
        "cut": not generated.finished,
        "empty": not generated.text,
        "repeats": repeats_itself(generated.token_ids or generated.text.split()),
    }
    return [remark for remark, does in applies.items() if does]


def repeats_itself(tokens: Sequence[object], *, times: int = 3, least: int = 6) -> bool:
    """Tell whether a stretch of tokens is repeated directly after itself.

    >>> repeats_itself("a red red red red red red car".split())
    True

    Args:
        tokens: token ids or words.
        times: how often the stretch must occur in a row.
        least: how many tokens all the repetitions must have together.
    """
    for width in range(1, len(tokens) // times + 1):
        run = 0
        for i in range(width, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - width] else 0
            if run >= (times - 1) * width and run + width >= least:
                return True
    return False

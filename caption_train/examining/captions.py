"""Measures captions: words, tokens of a family, tags, repeats, and control tokens that they spell."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caption_train.data.text import TOKEN_NAMES
from caption_train.errors import UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.metrics.tags import split_tags
from caption_train.system.console import ProgressBar
from caption_train.system.damage import explaining_damage

if TYPE_CHECKING:
    from caption_train.config.compiling import CompileOptions


@dataclass(frozen=True)
class Tokens:
    """How a family reads captions.

    Attributes:
        title: what the family is called.
        model_id: whose tokenizer it is.
        limit: how many tokens training keeps of a caption, those of its start and end included.
        count: returns how many a caption has, uncut, start and end included.
        names: the control tokens that stay text where a caption spells them.
    """

    title: str
    model_id: str
    limit: int
    count: Callable[[str], int]
    names: frozenset[str]


def load_tokens(options: CompileOptions) -> Tokens | None:
    """Return how the family of `--family` reads captions; None where none is named.

    Raises:
        UsageError: there is no such family, or it has no model of its own and none is named.
        CaptionTrainError: its tokenizer is not there, or is damaged.
    """
    if options.family is None:
        return None
    if options.family not in FAMILIES:
        raise UsageError(f"--family {options.family}: the families are {', '.join(FAMILIES)}")
    family = get_family(options.family)
    model_id = options.model_id or family.model_id
    if model_id is None:
        raise UsageError(
            f"--family {options.family}: name a model with --model_id, such as {family.example_model}"
        )
    processor = family.load_text_processor(model_id, revision=options.revision)
    with explaining_damage(f"--model_id {model_id}: its tokenizer is damaged"):
        around = family.count_frame_tokens(processor)
        names = processor.tokenizer.convert_ids_to_tokens(sorted(family.control_ids(processor)))
        family.tokenize_caption(processor, "a cat")
    return Tokens(
        family.title,
        model_id,
        min(options.max_length, processor.tokenizer.model_max_length),
        lambda caption: len(family.tokenize_caption(processor, caption)) + around,
        frozenset(filter(None, names)),
    )


def count_tokens(captions: Sequence[str], tokens: Tokens) -> list[int]:
    """Return how many tokens each caption has; shows a progress bar."""
    counts = []
    with ProgressBar(len(captions), "counting tokens", "caption", leave=False) as bar:
        for caption in captions:
            counts.append(tokens.count(caption))
            bar.update()
    return counts


def find_repeated(captions: Sequence[str]) -> list[list[int]]:
    """Return groups of places whose captions are the same, upper and lower case and spaces aside.

    The largest group goes first.

    >>> find_repeated(["a cat", "a dog", "A  cat", "a dog", "a dog"])
    [[1, 3, 4], [0, 2]]
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, caption in enumerate(captions):
        places[" ".join(caption.casefold().split())].append(place)
    return sorted((group for group in places.values() if len(group) > 1), key=len, reverse=True)


def find_spelled(captions: Sequence[str], names: Iterable[str] = ()) -> dict[int, list[str]]:
    """Return place → the control tokens that its caption spells: those of many models, and these names.

    >>> find_spelled(["a cat</s>", "a dog", "<boa> a cow"], ["<boa>"])
    {0: ['</s>'], 2: ['<boa>']}
    """
    own = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile("|".join([*own, TOKEN_NAMES.pattern]))
    found = {place: list(dict.fromkeys(pattern.findall(text))) for place, text in enumerate(captions)}
    return {place: tokens for place, tokens in found.items() if tokens}


def count_tags(captions: Iterable[str]) -> Counter[str]:
    """Return in how many captions each tag is; see `split_tags`."""
    return Counter(tag for caption in captions for tag in split_tags(caption))

"""Tokenizes captions so that no text becomes a control token: `</s>` in a caption stays five characters.

Tokenizers turn the name of a special token into the token itself, wherever it stands in a text. In a caption
that would train an end in the middle, or an image where there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_LOOKS_LIKE_CONTROL = re.compile(r"<\|.*\|>", re.DOTALL)


def caption_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, control: Collection[int] | None = None
) -> list[int]:
    """Return the ids of a text, without any token added and without a control token.

    A text that spells out no control token has the ids that the tokenizer gives it.

    Args:
        tokenizer: the model's tokenizer.
        text: a caption.
        control: ids that no text may become; by default `control_ids`.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    control = control_ids(tokenizer) if control is None else control
    return encode_as_text(tokenizer, text, control) if spells_control(tokenizer, text, ids, control) else ids


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokens that mean something beside their text.

    These are all special tokens, and tokens added in the form `<|…|>`, which not every tokenizer marks as
    special. Other added tokens are text: runs of spaces (Phi), HTML tags (Gemma), places (PaliGemma).
    """
    if tokenizer not in _CONTROL:
        added = tokenizer.added_tokens_decoder.items()
        _CONTROL[tokenizer] = frozenset(tokenizer.all_special_ids) | {
            id for id, token in added if token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content)
        }
    return _CONTROL[tokenizer]


def named_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokens that have a role (BOS, EOS, padding, …), not those of extra ones."""
    if tokenizer not in _NAMED:
        roles = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
        ids = (getattr(tokenizer, f"{role}_token_id", None) for role in roles)
        _NAMED[tokenizer] = frozenset(id for id in ids if id is not None)
    return _NAMED[tokenizer]


def spells_control(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Collection[int], control: Collection[int]
) -> bool:
    """Tell whether a text spells out a control token, which is then among its `ids`.

    Characters that the vocabulary lacks become the unknown token too; they spell out nothing.
    """
    if not (found := set(ids) & set(control)):
        return False
    return found != {tokenizer.unk_token_id} or tokenizer.unk_token in text


def encode_as_text(tokenizer: PreTrainedTokenizerBase, text: str, control: Collection[int]) -> list[int]:
    """Return the ids of a text as if its tokenizer did not know the tokens in `control`."""
    allowed = {tokenizer.unk_token_id}
    ids = _encode_without(tokenizer, text, frozenset(control))
    if not set(ids) & set(control) - allowed:
        return ids
    # The names stand in the model's vocabulary too (Unigram). A cut in the middle leaves nothing to find.
    names = map(re.escape, filter(None, map(tokenizer.convert_ids_to_tokens, control)))
    cuts = [match.start() + 1 for match in re.finditer("|".join(sorted(names, key=len, reverse=True)), text)]
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [id for part in parts for id in _encode_without(tokenizer, part, frozenset(control))]
    return [id for id in ids if id in allowed or id not in control]


def _encode_without(tokenizer: PreTrainedTokenizerBase, text: str, control: frozenset[int]) -> list[int]:
    if not tokenizer.is_fast:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
    stripped = _STRIPPED.setdefault(tokenizer, {})
    if control not in stripped:
        stripped[control] = _strip(tokenizer.backend_tokenizer, control)
    tokens = stripped[control].encode(text, add_special_tokens=False).tokens
    # By name, because tokens added after a removed one have other ids in the copy.
    return [tokenizer.backend_tokenizer.token_to_id(token) for token in tokens]


def _strip(tokenizer: Tokenizer, control: frozenset[int]) -> Tokenizer:
    """Return a copy of a tokenizer that finds none of these tokens in a text."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in control]
    return Tokenizer.from_str(
        json.dumps(content | {"truncation": None, "padding": None, "post_processor": None})
    )


_CONTROL: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()
_NAMED: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()
_STRIPPED: WeakKeyDictionary[PreTrainedTokenizerBase, dict[frozenset[int], Tokenizer]] = WeakKeyDictionary()
"""What was found out about tokenizers, which are read whole for it; kept as long as they are."""

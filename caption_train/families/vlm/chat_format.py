"""Finds out how a checkpoint writes a conversation, and proves that our rows hold the ids of the whole."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError
from caption_train.families.vlm.chat import (
    ChatFormat,
    NoFormat,
    answer_ids,
    list_image_tokens,
    list_marker_ids,
    render,
    starts_with_bos,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

SENTINEL = "what does the picture show"
"""A prompt that no template contains, to see what a template makes of one."""
CAPTIONS = ("a small red boat", "Two dogs, one cat.", "1girl, solo")
"""Captions of different first characters, to hold our ids against those of the whole conversation."""


def find_chat_format(processor: ProcessorMixin, stop_ids: Sequence[int], model_id: str) -> ChatFormat:
    """Return how this checkpoint's conversations are written.

    Args:
        processor: the checkpoint's own.
        stop_ids: the ids that end an answer, as its generation config lists them.
        model_id: for the message.

    Raises:
        UsageError: no way of writing fits the template; one line with the reason.
    """
    reasons = []
    contents = ("list", "string") if processor.chat_template else ("prefix",)
    for content in contents:
        try:
            markers = list_marker_ids(processor)
            return _check(processor, ChatFormat(content, stop_ids=tuple(stop_ids), marker_ids=markers))
        except NoFormat as error:
            reasons.append(str(error))
    # The way that came furthest says most; of equal ones the first is how the template is meant.
    raise UsageError(f"--model_id {model_id}: {max(reasons, key=_how_far)}")


def _check(processor: ProcessorMixin, chat: ChatFormat) -> ChatFormat:
    """Return `chat` completed, once its ids are those of the whole conversation; NoFormat where not."""
    if chat.content == "prefix":
        chat, wholes = _read_prefix(processor, chat)
        text = processor.image_token + SENTINEL
    else:
        text = render(processor, chat, SENTINEL)
        _check_prompt(processor, text)
        chat = _read_answer(
            processor.tokenizer, chat, text, render(processor, chat, SENTINEL, answer=CAPTIONS[0])
        )
        wholes = [_encode(processor, render(processor, chat, SENTINEL, answer=c)) for c in CAPTIONS]
    prompt = _encode(processor, text)
    anchor = re.search(r"\S*\s*$", _after_special(processor.tokenizer, text)).group()
    for candidate in (chat, replace(chat, anchor=anchor)):
        if all(
            _is_whole(processor.tokenizer, candidate, prompt, w, c)
            for w, c in zip(wholes, CAPTIONS, strict=True)
        ):
            return replace(candidate, fills=_find_fills(prompt, wholes[0]))
    raise NoFormat(
        "its tokenizer reads a prompt, and a caption after it, otherwise than the whole conversation"
    )


def _check_prompt(processor: ProcessorMixin, text: str) -> None:
    if text.count(SENTINEL) != 1 or re.search(r"""['"](type|text)['"]\s*:""", text):
        raise NoFormat("its chat template does not write the prompt as it is")
    counts = {token: text.count(token) for token in list_image_tokens(processor)}
    token, count = next(((token, count) for token, count in counts.items() if count), ("", 0))
    if count != 1:
        raise NoFormat(f"its chat template writes {count or 'no'} image token{'s' if count else ''}, not one")
    if token not in processor.tokenizer.get_vocab():
        raise NoFormat(f"its tokenizer does not know the image token {token} of its chat template")


def _read_answer(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, prompt: str, whole: str) -> ChatFormat:
    """Find what stands around the caption in the whole conversation."""
    if not whole.startswith(prompt):
        raise NoFormat(
            "its chat template does not begin a whole conversation with the prompt that it gives to a model"
        )
    lead, found, tail = whole[len(prompt) :].partition(CAPTIONS[0])
    if not found:
        raise NoFormat("its chat template does not write the answer as it is")
    if lead.strip():
        raise NoFormat(
            f"its chat template puts {lead.strip()!r} before every answer: a model that thinks first, and "
            "cannot be told not to, is no captioner"
        )
    end_ids, written = _find_end(tokenizer, chat, tail)
    return replace(chat, lead=lead, end_ids=end_ids, written=written)


def _find_end(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tail: str) -> tuple[tuple[int, ...], int]:
    """Return what is learnt after the caption, and how much of it the template writes: its end of a turn.

    Where that is no token that ends an answer, the tokenizer's EOS follows.

    A model that never saw its end would go on to the token limit, so there is always one.
    """
    ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
    for index, token in enumerate(ids):
        if token in chat.stop_ids:
            return tuple(ids[: index + 1]), index + 1
    special = [i for i, token in enumerate(ids) if token in tokenizer.all_special_ids]
    kept = ids[: special[0] + 1] if special else []
    eos = tokenizer.eos_token_id
    if eos is None and not chat.stop_ids:
        raise NoFormat("neither its tokenizer nor its generation config names a token that ends an answer")
    return (*kept, chat.stop_ids[0] if eos is None else eos), len(kept)


def _read_prefix(processor: ProcessorMixin, chat: ChatFormat) -> tuple[ChatFormat, list[dict[str, Any]]]:
    """Read how a processor without a chat template joins prompt and caption: as `suffix`, or not at all."""
    tokenizer = processor.tokenizer
    if (
        "suffix" not in inspect.signature(type(processor).__call__).parameters
        or tokenizer.eos_token_id is None
    ):
        raise NoFormat(
            "it has no chat template, so nothing says how it reads a prompt; take the instruction-tuned "
            "checkpoint, or put its chat_template.jinja into the folder"
        )
    text = processor.image_token + SENTINEL
    wholes = [_encode(processor, text, suffix=[caption]) for caption in CAPTIONS]
    return replace(chat, end_ids=(tokenizer.eos_token_id,), written=1), wholes


def _encode(processor: ProcessorMixin, text: str, **keywords: Any) -> dict[str, Any]:
    """Return the processor's row for a text with one image: names → lists of T values, and pixels."""
    from PIL import Image

    image = Image.new("RGB", (128, 96), "gray")
    add = not starts_with_bos(processor.tokenizer, text)
    try:
        encoded = processor(
            text=[text], images=[[image]], return_tensors="pt", add_special_tokens=add, **keywords
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise NoFormat(f"its processor refuses the prompt that its chat template makes: {reason}") from error
    return {
        name: value[0].tolist() for name, value in encoded.items() if _is_row(value, encoded["input_ids"])
    }


def _is_row(value: Any, input_ids: Any) -> bool:
    return getattr(value, "shape", None) == input_ids.shape


def _is_whole(
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatFormat,
    prompt: Mapping[str, list[int]],
    whole: Mapping[str, list[int]],
    caption: str,
) -> bool:
    ids = [*prompt["input_ids"], *answer_ids(tokenizer, chat, caption), *chat.end_ids[: chat.written]]
    is_bos_doubled = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    return whole["input_ids"][: len(ids)] == ids and not is_bos_doubled


def _find_fills(prompt: Mapping[str, list[int]], whole: Mapping[str, list[int]]) -> dict[str, int]:
    """Return what the processor writes at a caption's positions beside its ids, by the tensor's name."""
    first = len(prompt["input_ids"])
    return {
        name: whole[name][first] for name in prompt if name not in ("input_ids", "labels") and name in whole
    }


def _after_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and str(token):
            text = text.rpartition(str(token))[2]
    return text


def _how_far(reason: str) -> int:
    order = (
        "refuses the conversation",
        "as it is",
        "image token",
        "begin a whole",
        "before every",
        "processor",
    )
    return max((i for i, words in enumerate(order) if words in reason), default=len(order))

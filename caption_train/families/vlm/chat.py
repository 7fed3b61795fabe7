"""How a checkpoint's conversation holds prompt, image and caption: which ids are read, which are learnt.

A training row is what generation reads (the prompt as the processor encodes it), then the caption, then the
end token. chat_format.py finds the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

THINKING_OFF = {"enable_thinking": False, "thinking": False}
"""The names that templates give to the switch of what a model thinks before it answers."""
IMAGE_TOKENS = ("image_token", "boi_token", "start_image_token", "image_start_token")
"""Attributes of a processor or a tokenizer that name the token which stands for an image in a template."""


class NoFormat(Exception):
    """A way to write a conversation that does not fit a template; the message says why."""


@dataclass(frozen=True)
class ChatFormat:
    """How prompt, image and caption are written down for one checkpoint.

    content: how a message holds text and image. "list": [{"type": "image"}, {"type": "text"}]; "string": the
    template adds the image itself; "prefix": no template, the processor takes the prompt alone (PaliGemma).
    lead: what the template writes between the prompt and the caption, white space or nothing.
    anchor: text to tokenize before lead and caption where the tokenizer needs a context, else "".
    end_ids: what follows the caption, up to the first token that ends an answer; the first `written` of them
    stand in the template. stop_ids: all tokens that end an answer. marker_ids: tokens that the template
    writes, special or not.
    fills: values of the caption's positions in tensors beside `input_ids`, such as `token_type_ids`.
    """

    content: str
    lead: str = ""
    anchor: str = ""
    end_ids: tuple[int, ...] = ()
    written: int = 0
    stop_ids: tuple[int, ...] = ()
    marker_ids: tuple[int, ...] = ()
    fills: Mapping[str, int] = field(default_factory=dict)


def render_prompt(processor: ProcessorMixin, chat: ChatFormat, prompt: str, system_prompt: str = "") -> str:
    """Return the text of a conversation up to where the model's answer begins.

    Raises:
        UsageError: the template has no place for a system prompt, or for this prompt.
    """
    if chat.content == "prefix":
        if system_prompt:
            raise UsageError("--system_prompt: this model has no chat template, so no system prompt; drop it")
        return processor.image_token + prompt
    try:
        text = render(processor, chat, prompt, system_prompt)
    except NoFormat as error:
        flag = "--system_prompt" if system_prompt else "--prompt"
        raise UsageError(f"{flag}: {error}") from error
    if system_prompt and system_prompt.strip() not in text:
        raise UsageError("--system_prompt: this model's chat template has no place for one; drop it")
    return text


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Tell whether a template wrote the BOS token itself, so that the tokenizer must not add another."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def answer_ids(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, caption: str) -> list[int]:
    """Return the ids of a caption as it follows the prompt, without its end.

    Control tokens that a caption spells out stay text: `<|im_end|>` in a caption does not end it.
    """
    from caption_train.families.caption_ids import encode_as_text, spells_control

    ids = _follow(chat, caption, partial(_text_ids, tokenizer))
    control = list_control_ids(tokenizer, chat)
    if not spells_control(tokenizer, caption, ids, control):
        return ids
    return _follow(chat, caption, lambda text: encode_as_text(tokenizer, text, control))


def list_control_ids(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> frozenset[int]:
    """Return the ids of the tokens that mean something beside their text, those of the chat format too."""
    from caption_train.families.caption_ids import control_ids

    return control_ids(tokenizer) | set(chat.stop_ids) | set(chat.marker_ids)


def list_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what has a meaning of its own to the model: the image token, the end of a turn, …"""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]


def _follow(chat: ChatFormat, caption: str, tokenize: Callable[[str], list[int]]) -> list[int]:
    if chat.anchor:
        before, both = tokenize(chat.anchor), tokenize(chat.anchor + chat.lead + caption)
        if both[: len(before)] == before:
            return both[len(before) :]
    return tokenize(chat.lead + caption)


def list_marker_ids(processor: ProcessorMixin) -> tuple[int, ...]:
    """Return the ids of added tokens that the chat template writes: `<think>` is not marked as special."""
    template = str(processor.chat_template)
    return tuple(
        id
        for id, token in processor.tokenizer.added_tokens_decoder.items()
        if _MARKER.fullmatch(token.content) and token.content in template
    )


_MARKER = re.compile(r"[<\[].*\w.*[>\]]", re.DOTALL)


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def render(
    processor: ProcessorMixin,
    chat: ChatFormat,
    prompt: str,
    system_prompt: str = "",
    answer: str | None = None,
) -> str:
    """Return the conversation as text; with an answer all of it, else up to where the answer begins."""
    from transformers import ProcessorMixin

    as_list = chat.content == "list"
    texts = [("system", system_prompt)] if system_prompt else []
    texts += [("user", prompt)] + ([("assistant", answer)] if answer is not None else [])
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if as_list else text}
        for role, text in texts
    ]
    if as_list:
        next(m for m in messages if m["role"] == "user")["content"].insert(0, {"type": "image"})
    try:
        # SmolVLM's own method reads settings of a video processor, which is not loaded here.
        return ProcessorMixin.apply_chat_template(
            processor, messages, add_generation_prompt=answer is None, **_switches(processor.chat_template)
        )
    # Templates are code of the checkpoint's authors: they raise whatever they trip over.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise NoFormat(f"its chat template refuses the conversation: {reason}") from error


def _switches(template: Any) -> dict[str, bool]:
    """Return the switches that the template reads; others would be taken for settings of the processor."""
    text = str(template)
    return {name: value for name, value in THINKING_OFF.items() if re.search(rf"\b{name}\b", text)}


def list_image_tokens(processor: ProcessorMixin) -> list[str]:
    """Return the tokens that may stand for an image in a template, the likeliest first."""
    found = [
        getattr(holder, name, None) for name in IMAGE_TOKENS for holder in (processor, processor.tokenizer)
    ]
    return list(dict.fromkeys(str(token) for token in found if token))

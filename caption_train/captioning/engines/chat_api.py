"""Asks a server that speaks OpenAI's chat API: vLLM, llama.cpp, SGLang. No torch.

What may pass (no connection, a busy server, an answer that is none) is tried again, each time after a longer
pause; what will not (a refused image, a wrong key, an unknown model) is said at once. The key comes from the
environment and appears nowhere else.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from caption_train.config.captioning import KEY_VARIABLE, CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Generated
from caption_train.system.console import escape_unprintable
from caption_train.system.files import parse_json

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that another try may not meet again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first and, doubled each time, before the last tries."""
LARGEST_ANSWER = 1 << 22
"""Bytes of an answer, far above any caption."""


class Refused(Exception):
    """The server will not caption this image; another try would not help."""


class Unanswered(Exception):
    """No answer after all tries."""


@dataclass
class Endpoint:
    """A server, and how to ask it.

    url: of its chat completions. model: the name it serves the model under. options: how captions are made,
    and how long to wait. key: sent as a bearer token, if there is one.
    """

    url: str
    model: str
    options: CaptionOptions
    key: str | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    failures: int = 0
    """Images so far, and those in a row without an answer."""
    extras: dict[str, Any] = field(
        default_factory=lambda: {"chat_template_kwargs": {"enable_thinking": False}}
    )
    """What OpenAI's API does not know but other servers do; left out once a server objects to it."""

    @property
    def longest_wait(self) -> float:
        """Seconds after which an image's request must have ended, all tries and queueing together."""
        return 10 * (self.options.retries + 1) * (self.options.timeout + LONGEST_PAUSE)

    @classmethod
    def from_options(cls, options: CaptionOptions) -> Endpoint:
        """Return the server that `--endpoint` and `--model` name; its key is in CAPTION_TRAIN_API_KEY."""
        return cls(complete_url(options.endpoint), options.model, options, read_key())

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> Generated:
        """Return the answer to a conversation.

        Raises:
            Refused: the server will not answer this one.
            Unanswered: it did not answer, in `--retries` more tries.
            CaptionTrainError: it would answer none, for want of a key or of the model.
        """
        pause, reason = FIRST_PAUSE, "the run ends"
        for attempt in range(self.options.retries + 1):
            if self.stopped.wait(pause * random.uniform(0.8, 1.2) if attempt else 0):
                break
            try:
                return read_answer(self._post(messages))
            except urllib.error.HTTPError as error:
                reason = self._explain(error)
                if error.code not in PASSING:
                    continue
                pause = min(max(2 * pause, _read_wait(error)), LONGEST_PAUSE)
            except (OSError, HTTPException, ValueError) as error:
                reason = _name_error(error, self.options.timeout)
                pause = min(2 * pause, LONGEST_PAUSE)
        raise Unanswered(f"{reason} ({self.options.retries + 1} tries)")

    def _post(self, messages: Sequence[Mapping[str, Any]]) -> bytes:
        options = self.options
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": options.max_token_length,
            "temperature": options.temperature,
            **({"top_p": options.top_p, "seed": options.seed} if options.temperature else {}),
            **self.extras,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        deadline, parts = time.monotonic() + options.timeout, []
        with _OPENER.open(request, timeout=options.timeout) as response:
            # The timeout is for each piece alone: one that drips would go on for ever.
            while part := response.read1(LARGEST_ANSWER):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError
                if sum(map(len, parts)) > LARGEST_ANSWER:
                    raise ValueError("larger than a caption can be")
        return b"".join(parts)

    def _explain(self, error: urllib.error.HTTPError) -> str:
        """Return why the server refuses; raise where it would refuse every image, or this one for good."""
        said = self._read_message(error)
        reason = f"the server answers {error.code}" + (f": {said}" if said else "")
        if error.code in PASSING:
            return reason
        if error.code == 400 and self.extras and "chat_template_kwargs" in said:
            self.extras = {}
            return reason
        if error.code in (401, 403, 404, 405) or 300 <= error.code < 400:
            # Nor would it answer those that other threads are about to ask for.
            self.stopped.set()
        if error.code in (401, 403):
            advice = "does not take the key in" if self.key else "wants a key: put it into"
            raise CaptionTrainError(f"--endpoint {self.url}: {advice} {KEY_VARIABLE}") from error
        if error.code in (404, 405) or 300 <= error.code < 400:
            raise CaptionTrainError(
                f"--endpoint {self.url}, --model {self.model}: {reason}; check both"
            ) from error
        raise Refused(reason) from error

    def _read_message(self, error: urllib.error.HTTPError) -> str:
        """Return what a server says of an error, in one line and without the key."""
        try:
            text = error.read(4000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            return ""
        try:
            content = parse_json(text)
            found = content.get("error", content)
            text = str(found.get("message", found) if isinstance(found, dict) else found)
        except (ValueError, AttributeError):
            pass
        text = " ".join(text.split())[:300]
        return escape_unprintable(text.replace(self.key, "***") if self.key else text)


def read_key() -> str | None:
    """Return the key in the environment, without the line break that it has from a file; None for no key.

    Raises UsageError for one that no header can hold: http.client's own message would print it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"--endpoint: {KEY_VARIABLE} holds characters that no key has: set it anew")
    return key or None


def complete_url(url: str) -> str:
    """Return where a server's chat completions are: `http://host:8000` may be given, or with `/v1`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--endpoint {url}: is no URL such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UsageError(f"--endpoint: leave the key out of the URL and put it into {KEY_VARIABLE}")
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def read_answer(content: bytes) -> Generated:
    """Return the caption in an answer; ValueError for what is none."""
    answer = parse_json(content)
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("holds no choices with a message") from error
    if not isinstance(text, str):
        raise ValueError("holds no text")
    # Neither NUL nor half of a surrogate pair, which JSON can spell, can stand in a caption file.
    text = text.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")
    return Generated(text.strip(), finished=choice.get("finish_reason") != "length")


def _read_wait(error: urllib.error.HTTPError) -> float:
    """Return how many seconds a busy server asks to wait."""
    try:
        return max(float(error.headers.get("Retry-After", 0)), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _name_error(error: Exception, timeout: float) -> str:
    cause = getattr(error, "reason", None)
    cause = cause if isinstance(cause, Exception) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout:g} s (--timeout)"
    if isinstance(cause, ValueError):
        return f"the answer is none: {next(iter(str(cause).splitlines()), '')}"
    return f"no connection: {getattr(cause, 'strerror', None) or cause or type(cause).__name__}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key to another server."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)

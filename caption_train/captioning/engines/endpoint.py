"""`--endpoint`: captions by a server that speaks OpenAI's chat API; chat_api.py asks it. No torch.

A few threads keep a bounded number of requests under way.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from caption_train.adapters.record import Base
from caption_train.captioning.engines.chat_api import Endpoint, Refused, Unanswered
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.data.images import ImageError, open_image
from caption_train.errors import CaptionTrainError
from caption_train.families.base import Family
from caption_train.system.console import escape_unprintable

MOST_FAILURES = 3
"""Images in a row that get no answer: then it is the server, not the image."""


class ServerEngine(Engine):
    """The server of `--endpoint`."""

    always_says_prompt = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._endpoint = Endpoint.from_options(self.options)

    def describe(self) -> str:
        """Return model and address; see `Engine.describe`."""
        return f"{self._endpoint.model} at {self._endpoint.url}"

    def stream(self, tasks: Iterable[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Ask the server; see `Engine.stream`."""
        return caption_by_endpoint(self._endpoint, self.family, tasks, self.base)


def caption_by_endpoint(
    endpoint: Endpoint, family: Family, tasks: Iterable[Task], base: Base
) -> Iterator[CaptionResult | Unreadable]:
    """Yield what became of every image, in order; `--concurrency` are under way at once.

    Raises CaptionTrainError when the server answers no image, or several in a row get no answer.
    """
    endpoint.stopped.clear()
    queued: queue.SimpleQueue[tuple[Task, Future] | None] = queue.SimpleQueue()
    most, threads = endpoint.options.concurrency, 0
    waiting: deque[Future] = deque()
    pending = iter(tasks)
    try:
        while True:
            while len(waiting) < 2 * most and (task := next(pending, None)) is not None:
                waiting.append(Future())
                queued.put((task, waiting[-1]))
                endpoint.asked += 1
                if threads < most:
                    threads += 1
                    # A daemon: a request under way must not keep an interrupted command from ending.
                    threading.Thread(target=_work, args=(queued, endpoint, family, base), daemon=True).start()
            if not waiting:
                return
            try:
                result, is_unanswered = waiting.popleft().result(endpoint.longest_wait)
            except FutureTimeout:
                raise CaptionTrainError(f"--endpoint {endpoint.url}: no answer, and no end of one") from None
            endpoint.failures = endpoint.failures + 1 if is_unanswered else 0
            # Before the last one is told: a shard that gets it as well would be complete.
            if endpoint.failures >= min(MOST_FAILURES, endpoint.asked):
                raise CaptionTrainError(
                    f"--endpoint {endpoint.url}: {endpoint.failures} in a row got no answer: "
                    f"{result.reason.partition(': ')[2]}"
                )
            yield result
    finally:
        endpoint.stopped.set()
        for _ in range(threads):
            queued.put(None)


def _work(queued: queue.SimpleQueue, endpoint: Endpoint, family: Family, base: Base) -> None:
    while (entry := queued.get()) is not None and not endpoint.stopped.is_set():
        task, future = entry
        try:
            future.set_result(_caption(endpoint, family, task, base))
        except BaseException as error:
            future.set_exception(error)


def _caption(
    endpoint: Endpoint, family: Family, task: Task, base: Base
) -> tuple[CaptionResult | Unreadable, bool]:
    """Return what became of one image, and whether that is for want of an answer."""
    path = task.image
    try:
        image = open_image(path)
        messages = family.write_conversation(image, task.prompt, base.settings)
        return CaptionResult(path, image.size, endpoint.ask(messages)), False
    except ImageError as error:
        return Unreadable(path, str(error)), False
    except Refused as error:
        return Unreadable(path, f"{escape_unprintable(path)}: {error}"), False
    except Unanswered as error:
        return Unreadable(path, f"{escape_unprintable(path)}: {error}"), True

"""Writes captions in a thread of its own, while the model makes the next ones. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from caption_train.captioning.outputs import Caption, KeyedOutputs

MOST_WAITING = 32
"""Captions on their way to the disk, at most: with the batches in work, what a kill can lose."""


@dataclass(frozen=True)
class Written:
    """A caption that is on the disk, or one in whose place somebody else's is.

    Attributes:
        caption: as it was given.
        key: the name of its prompt.
        place: as it was given.
        is_ours: whether it was written; False if somebody else has written one, which stays.
    """

    caption: Caption
    key: str
    place: int
    is_ours: bool


class CaptionWriter:
    """Writes captions one after the other, in the order in which they come.

    The outputs belong to its thread from the first `put` until `finished(wait=True)` has ended.

    Args:
        outputs: where captions are written to; open.
        note: called in its thread with each caption that is written. Ctrl-C, which ends what the main thread
            does at any point, does not come between the two.
        most: captions that may wait; then `finished` waits until there are fewer.
    """

    def __init__(
        self, outputs: KeyedOutputs, note: Callable[[Written], None], most: int = MOST_WAITING
    ) -> None:
        self._outputs, self._note, self._most = outputs, note, most
        self._thread = ThreadPoolExecutor(1, "captions")
        self._waiting: deque[Future[Written]] = deque()
        self._failure: BaseException | None = None

    def put(self, caption: Caption, key: str, place: int = 0) -> None:
        """Have a caption written; `finished` says when it is."""
        self._waiting.append(self._thread.submit(self._write, caption, key, place))

    def finished(self, *, wait: bool = False) -> Iterator[Written]:
        """Yield the captions that are written by now, in the order in which they came.

        Each comes once; after Ctrl-C or an error that of which the caller was not done comes again.

        Args:
            wait: whether to wait for all of them.

        Raises:
            CaptionTrainError: one could not be written; those after it are not.
        """
        while self._waiting and (wait or len(self._waiting) > self._most or self._waiting[0].done()):
            # Only then is it forgotten: Ctrl-C may end the wait, or what the caller does.
            yield self._waiting[0].result()
            self._waiting.popleft()
        if wait:
            # Ctrl-C may have ended `put` before it was known here that a caption is written.
            self._thread.submit(int).result()

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, caption: Caption, key: str, place: int) -> Written:
        if self._failure is not None:
            raise self._failure
        try:
            written = Written(caption, key, place, self._outputs.write(caption, key))
            self._note(written)
            return written
        except BaseException as error:
            self._failure = error
            raise

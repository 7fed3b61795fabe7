"""Shares work between forked processes, on Linux: each does one task at a time, and ends with its parent."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

MOST = 16
"""Processes: what one process finds and hands out keeps no more of them busy."""


class Forked:
    """Forked processes that do tasks; a context manager, at whose end they end.

    They are forked when there is a second task for them, so that a small dataset needs none. The process that
    holds this one must have no threads.

    Args:
        count: how many processes at most.
        watched: a connection; `on_word` is called when there is something to read from it, or its end.
        on_word: may raise, which ends the work.
    """

    def __init__(self, count: int, watched: Connection, on_word: Callable[[], None]) -> None:
        self.count, self.watched, self.on_word = min(count, MOST), watched, on_word
        self._ends: list[Connection] = []
        self._children: list[int] = []

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for end in self._ends:
            end.close()
        for child in self._children:
            with suppress(OSError):
                if kind is not None:
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Iterable[Any],
        take: Callable[[int, Any], None],
    ) -> None:
        """Call a function with each task.

        Args:
            function: a function that can be pickled.
            tasks: what can be pickled; the next one is made when a process has time for it.
            take: called with the number of a task and what the function returned, in any order.

        Raises:
            EOFError: a process died.
            Exception: whatever the function raised.
        """
        tasks, number, busy = iter(tasks), 0, dict[Connection, int]()
        first = next(tasks, None)
        task = next(tasks, None) if self.count > 1 else None
        if task is None:
            self._run_here(function, tasks, first, take)
            return
        waiting = [task, first]
        while waiting or busy:
            while waiting and (free := self._find_free(busy)) is not None:
                free.send((function, waiting.pop()))
                busy[free] = number
                number += 1
                if not waiting and (task := next(tasks, None)) is not None:
                    waiting.append(task)
            self._wait(busy, take)

    def _run_here(
        self,
        function: Callable[[Any], Any],
        tasks: Iterator[Any],
        task: Any,
        take: Callable[[int, Any], None],
    ) -> None:
        number = 0
        while task is not None:
            take(number, function(task))
            while self.watched.poll():
                self.on_word()
            task = next(tasks, None)
            number += 1

    def _find_free(self, busy: dict[Connection, int]) -> Connection | None:
        free = next((end for end in self._ends if end not in busy), None)
        return self._fork() if free is None and len(self._ends) < self.count else free

    def _wait(self, busy: dict[Connection, int], take: Callable[[int, Any], None]) -> None:
        for ready in wait([*busy, self.watched]):
            if ready is self.watched:
                self.on_word()
                continue
            result, error = ready.recv()
            number = busy.pop(ready)
            if error is not None:
                raise error
            take(number, result)

    def _fork(self) -> Connection:
        here, there = Pipe()
        child = os.fork()
        if child:
            there.close()
            self._ends.append(here)
            self._children.append(child)
            return here
        try:
            # Each end that stayed open here would hide from another process that their parent has ended.
            for end in (here, self.watched, *self._ends):
                end.close()
            while True:
                _answer(there)
        finally:
            os._exit(0)


def _answer(there: Connection) -> None:
    function, task = there.recv()
    try:
        answer = (function(task), None)
    except Exception as error:
        answer = (None, error)
    there.send(answer)

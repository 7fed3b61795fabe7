"""Captions images on a Ray cluster: tasks decode and encode, actors hold the model. Needs `ray`.

What is captioned, and where captions are written, stays with the process that was started.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from caption_train.captioning.engines.cluster.failures import explaining_ray
from caption_train.captioning.engines.cluster.nodes import (
    CaptionActor,
    RayWork,
    detach,
    encode,
    load_processor,
)
from caption_train.captioning.engines.cluster.pool import MOST_TRIES, ActorPool
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.errors import UsageError
from caption_train.system.console import count_things, escape_unprintable

SECONDS_TO_ANSWER = 10
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN", "TOKENIZERS_PARALLELISM", "NVIDIA_TF32_OVERRIDE")
"""Variables of the environment that the cluster's processes get."""


class RayEngine(Engine):
    """A Ray cluster for the length of a run: that of `RAY_ADDRESS`, else one on this machine."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.processes.count > 1:
            raise UsageError("--engine ray starts its own processes: leave torchrun out")
        self._ray = _import_ray()
        base, local = self.base, Path(self.base.model_id).absolute()
        self._work = RayWork(
            self.family.name,
            replace(base, model_id=str(local) if local.is_dir() else base.model_id),
            replace(self.options, peft_model=self.options.peft_model and self.options.peft_model.absolute()),
        )
        self._gpus, self._actors, self._encoders = 0.0, 1, 1
        self._pool: ActorPool | None = None

    def describe(self) -> str:
        """Join the cluster, and return the model and how many processes hold it; see `Engine.describe`."""
        with explaining_ray():
            self._join()
        try:
            self._gpus, self._actors = self._choose()
        except BaseException:
            self.close()
            raise
        address = os.environ.get("RAY_ADDRESS", "this machine")
        each = f", {self._gpus:g} GPUs each" if self._gpus else ""
        actors = count_things(self._actors, "actor")
        return f"{self.name_model()} on Ray at {escape_unprintable(address)} ({actors}{each})"

    def open(self) -> list[str]:
        """Start the actors, and load the processor on a node; see `Engine.open`."""
        ray = self._ray
        # Actors that restart on fewer nodes may take all CPUs: a task that asks for one would never run.
        on_cpus = {"num_cpus": 1} if self._gpus else {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        make_task = ray.remote(max_retries=MOST_TRIES, **on_cpus)
        make_actor = ray.remote(num_cpus=int(not self._gpus), num_gpus=self._gpus, max_restarts=-1)
        try:
            with explaining_ray():
                actor, task = make_actor(CaptionActor), make_task(encode)
                handles = [actor.remote(self._work) for _ in range(self._actors)]
                processor, lines = ray.get(make_task(load_processor).remote(self._work))
                shared = [ray.put((self._work, processor))]
            self._pool = ActorPool(ray, handles, lambda tasks: task.remote(tasks, shared), self._encoders)
            self._pool.wait_for_one()
        except BaseException:
            self.close()
            raise
        return lines

    def stream(self, tasks: Iterable[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Yield a result for each task as soon as it and all before it are there; see `Engine.stream`."""
        given: deque[tuple[Task, Task]] = deque()

        def make_batches() -> Iterator[list[Task]]:
            left = iter(tasks)
            while batch := list(islice(left, self.options.batch_size)):
                sent = [detach(task) for task in batch]
                given.extend(zip(batch, sent, strict=True))
                yield sent

        for results in self._pool.caption(make_batches()):
            for result in results:
                yield _name_as_given(result, *given.popleft())

    def close(self) -> None:
        """Leave the cluster; one that was started for this run ends."""
        self._ray.shutdown()

    def _join(self) -> None:
        address = os.environ.get("RAY_ADDRESS", "")
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in address:
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        package = Path(__file__).parents[3]
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        with _without_first_line(), _keeping_sigterm():
            self._ray.init(
                address=os.environ.get("RAY_ADDRESS"),
                runtime_env={"py_modules": [str(package)], "env_vars": environment},
                log_to_driver=False,
                logging_level="error",
            )

    def _choose(self) -> tuple[float, int]:
        """Return the GPUs of an actor, and how many actors there are."""
        options, has = self.options, self._ray.cluster_resources()
        gpus = options.gpus_per_actor
        if gpus is None:
            gpus = 1.0 if has.get("GPU") and (options.device or "cuda").startswith("cuda") else 0.0
        if gpus > has.get("GPU", 0):
            raise UsageError(f"--gpus_per_actor {gpus:g}: the cluster has {has.get('GPU', 0):g} GPUs")
        most = int(has.get("GPU", 0) / gpus) if gpus else max(int(has.get("CPU", 1)) // 2, 1)
        actors, room = options.actors or most, most if gpus else int(has.get("CPU", 1))
        if actors > room:
            raise UsageError(f"--actors {actors}: the cluster has room for {room}")
        self._encoders = max(int(has.get("CPU", 1)) - actors, 1)
        return gpus, actors


def _name_as_given(result: CaptionResult | Unreadable, task: Task, sent: Task) -> CaptionResult | Unreadable:
    """Return a result with the path that the run was given: outputs know images by it."""
    if isinstance(result, CaptionResult):
        return replace(result, image=task.image)
    reason = result.reason
    for show in (str, escape_unprintable):
        reason = reason.replace(show(sent.image), show(task.image), 1)
    return Unreadable(task.image, reason)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Give SIGTERM back to who handled it. Ray takes it, and its C++ part then ends the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _without_first_line() -> Iterator[None]:
    """Drop what is written to stderr: Ray's C++ part tells there that RAY_BACKEND_LOG_LEVEL is set."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _import_ray() -> Any:
    # Its own lines would stand between those of a run; what goes wrong is raised.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # What nodes report comes to stdout, where captions may go.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        with _keeping_sigterm():
            import ray
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray ({error}): pip install ray, or leave --engine out"
        ) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray

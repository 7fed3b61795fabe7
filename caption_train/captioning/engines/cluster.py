"""Captions images on a Ray cluster: tasks decode and encode, actors hold the model. Needs `ray[data]`.

Ray Data plans, moves and repeats the work: https://docs.ray.io/en/latest/data/data.html. What is captioned,
and where captions are written, stays with the process that was started.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caption_train.adapters.record import Base
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.console import count_things, escape_unprintable

BATCHES_IN_BLOCK = 4
"""What is repeated at most when a node is lost, for each actor and each task."""
SECONDS_TO_ANSWER = 10
BYTES_OF_ENCODER = 512 << 20
"""Memory that a task with its batch of images is given."""
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN", "TOKENIZERS_PARALLELISM", "NVIDIA_TF32_OVERRIDE")
"""Variables of the environment that the cluster's processes get."""


@dataclass(frozen=True)
class RayWork:
    """What tasks and actors need to know; it is sent to them.

    Attributes:
        family: its name.
        base: the base and its prompt.
        options: the flags; paths in them are absolute.
    """

    family: str
    base: Base
    options: CaptionOptions


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
        self._gpus, self._actors, self._encoders, self._processor = 0.0, 1, 1, None

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
        """Load the processor on a node, which shows early whether the model can be loaded there."""
        try:
            with explaining_ray():
                probe = self._ray.remote(num_cpus=1, max_retries=2)(_load_processor)
                processor, lines = self._ray.get(probe.remote(self._work))
                self._processor = self._ray.put(processor)
        except BaseException:
            self.close()
            raise
        return lines

    def caption(self, tasks: Sequence[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Yield a result for each task as soon as it and all before it are there; see `Engine.caption`."""
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

        size = self._work.options.batch_size
        batches = [_absolute(tasks[start : start + size]) for start in range(0, len(tasks), size)]
        rows = [{"tasks": pickle.dumps(batch)} for batch in batches]
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.max_errored_blocks = 0
        # A row is a batch already, and its tensors are large.
        data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // BATCHES_IN_BLOCK))
        data = data.map(
            _encode,
            fn_args=(self._work, self._processor),
            compute=TaskPoolStrategy(size=self._encoders),
            num_cpus=1,
            # Also what keeps Ray from encoding inside of the actors: it joins steps that ask for the same.
            memory=BYTES_OF_ENCODER,
        )
        data = data.map(
            CaptionActor,
            fn_constructor_args=(self._work,),
            compute=ActorPoolStrategy(size=self._actors),
            num_gpus=self._gpus,
            num_cpus=1,
        )
        waiting = (task.image for task in tasks)
        with explaining_ray():
            for row in data.iter_rows():
                results = pickle.loads(row["results"])
                if isinstance(results, Exception):
                    raise results
                yield from (_name_as_given(result, next(waiting)) for result in results)

    def close(self) -> None:
        """Leave the cluster; one that was started for this run ends."""
        self._ray.shutdown()

    def _join(self) -> None:
        address = os.environ.get("RAY_ADDRESS", "")
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in address:
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        package = Path(__file__).parents[2]
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
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
        actors = options.actors or most
        if actors > (most if gpus else has.get("CPU", 1)):
            raise UsageError(f"--actors {actors}: the cluster has room for {most}")
        self._encoders = max(int(has.get("CPU", 1)) - actors, 1)
        return gpus, actors


class CaptionActor:
    """Holds the model, in a process of its own."""

    def __init__(self, work: RayWork) -> None:
        from caption_train.captioning.generate import load_captioner, make_generation
        from caption_train.system.devices import choose_device

        self.work, self.family = work, get_family(work.family)
        device = choose_device(work.options.device)
        model, processor = load_captioner(self.family, work.base, work.options, device)
        self._loaded = self.family, model, processor
        self._generation = make_generation(work.options, work.base.prompt)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Caption an encoded batch; see `_encode`."""
        from caption_train.captioning.generate import CaptionRun, OutOfMemoryError, caption_images

        tasks, batch = pickle.loads(row["tasks"]), pickle.loads(row["batch"])
        size = self.work.options.batch_size
        try:
            run = CaptionRun(*self._loaded, self._generation, 0, 0, keeping=None, graphs=None)
            results = run.caption_batch(batch, size)
        except OutOfMemoryError as error:
            results = error if size == 1 else None
        except CaptionTrainError as error:
            results = error
        if results is None:
            results = list(
                caption_images(
                    *self._loaded,
                    [task.image for task in tasks],
                    self._generation,
                    batch_size=max(size // 2, 1),
                    prompts=[task.prompt for task in tasks],
                )
            )
        return {"results": pickle.dumps(results)}


def _encode(row: dict[str, Any], work: RayWork, processor: Any) -> dict[str, Any]:
    """Open and encode the images of a batch of tasks."""
    import ray

    from caption_train.captioning.encoding import Encode, ImageFiles

    if isinstance(processor, ray.ObjectRef):
        processor = ray.get(processor)
    tasks = pickle.loads(row["tasks"])
    files = ImageFiles([task.image for task in tasks], [task.prompt for task in tasks])
    encode = Encode(get_family(work.family), processor, work.base.prompt)
    return row | {"batch": pickle.dumps(encode([files[index] for index in range(len(files))]))}


def _load_processor(work: RayWork) -> tuple[Any, list[str]]:
    """Return the processor and what it says of its inputs; shows early whether nodes can load the model."""
    family, base = get_family(work.family), work.base
    _, processor = family.load(base.model_id, revision=base.revision)
    family.set_up(processor, base.model_id, base.settings, [base.prompt])
    return processor, family.describe_inputs(processor)


def _absolute(tasks: Sequence[Task]) -> list[Task]:
    return [replace(task, image=task.image.absolute()) for task in tasks]


def _name_as_given(result: CaptionResult | Unreadable, image: Path) -> CaptionResult | Unreadable:
    """Return a result with the path that the run was given: outputs know images by it."""
    if isinstance(result, Unreadable):
        reason = result.reason.replace(str(result.image), str(image), 1)
        return Unreadable(image, reason)
    return replace(result, image=image)


def _import_ray() -> Any:
    # Its own lines would stand between those of a run; what goes wrong is raised.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            f'--engine ray needs Ray Data ({error}): pip install "ray[data]", or leave --engine out'
        ) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def explaining_ray() -> Iterator[None]:
    """Turn what Ray raises into one line."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, CaptionTrainError):
            raise cause from None
        raise CaptionTrainError(f"--engine ray: {_last_line(cause or error)}") from error
    except (ray.exceptions.RayError, OSError) as error:
        address = os.environ.get("RAY_ADDRESS")
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a cluster on this machine"
        raise CaptionTrainError(f"--engine ray: {where}: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

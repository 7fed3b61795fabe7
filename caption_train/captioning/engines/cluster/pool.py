"""Hands batches to the actors of a Ray cluster, and gives those of a lost actor to another.

Ray Data would do this for a data set that is known when it begins, and would load the model anew for each:
https://github.com/ray-project/ray/issues/46479. Here batches come for as long as the job lives. How many are
under way is bounded, as in https://docs.ray.io/en/latest/ray-core/patterns/limit-pending-tasks.html.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from caption_train.captioning.engines.cluster.failures import explaining_ray, find_cause, last_line
from caption_train.captioning.prompts import Task
from caption_train.errors import CaptionTrainError
from caption_train.system.console import count_things, escape_unprintable, print_line

MOST_TRIES = 4
"""How often a batch is given out, or a model loaded, whose actor died each time."""
AT_ONCE = 2
"""Batches that an actor has: one is captioned while the next one comes."""
MOST_FINISHED = 8
"""Batches that wait for the results of an earlier one, for each that is under way."""
OF_ACTORS = ("RayActorError", "NodeDiedError", "OutOfMemoryError")
OF_IMAGES = ("ObjectLostError", "WorkerCrashedError")
"""What Ray raises where an actor, or what it needs of the images, was lost."""
SECONDS_TO_SAY = 60
"""How long no actor is there until a line says so."""


@dataclass(eq=False)
class Batch:
    """Images that are captioned at once.

    Attributes:
        number: its place among all.
        tasks: what is asked, as nodes get it.
        encoded: a reference to what `encode` makes of it.
        tries: how many actors died of it or beside it.
        results: a result for each task.
    """

    number: int
    tasks: Sequence[Task]
    encoded: Any = None
    tries: int = 0
    results: list[Any] | None = None


@dataclass(eq=False)
class Actor:
    """An actor.

    Attributes:
        batches: those that it has.
        is_ready: whether it has loaded the model and answers.
        tries: how often it died while it loaded the model, since it last had it.
    """

    handle: Any
    batches: set[Batch] = field(default_factory=set)
    is_ready: bool = False
    tries: int = 0


class ActorPool:
    """The actors of a job.

    Args:
        ray: the module.
        handles: of the actors. Ray starts each of them again whenever it dies.
        encode: starts to encode these tasks on some node, and returns a reference.
        encoders: how many batches are encoded at once.
    """

    def __init__(
        self, ray: Any, handles: Sequence[Any], encode: Callable[[Sequence[Task]], Any], encoders: int
    ) -> None:
        self._ray, self._encode, self._encoders = ray, encode, encoders
        self._actors = [Actor(handle) for handle in handles]
        self._encoding: dict[Any, Batch] = {}
        self._encoded: list[Batch] = []
        self._at_work: dict[Any, tuple[Batch, Actor]] = {}
        self._starting: dict[Any, Actor] = {}
        self._loading: dict[Any, Actor] = {}
        self._count = 0
        for actor in self._actors:
            self._start_actor(actor)

    def wait_for_one(self) -> None:
        """Wait until an actor has loaded the model; CaptionTrainError if it cannot be loaded."""
        while not any(actor.is_ready for actor in self._actors):
            self._go_on(waits=True)

    def caption(self, batches: Iterable[Sequence[Task]]) -> Iterator[list[Any]]:
        """Yield the results of each batch, in order; batches are read as far ahead as work is under way.

        Raises:
            CaptionTrainError: a batch cannot be captioned; its actors died, or the model cannot be loaded.
        """
        coming, waiting = iter(batches), deque[Batch]()
        while True:
            while self._has_room(len(waiting)) and (tasks := next(coming, None)) is not None:
                self._count += 1
                waiting.append(Batch(self._count, tasks))
                self._start(waiting[-1])
            if not waiting:
                return
            self._go_on(waits=waiting[0].results is None)
            if waiting[0].results is not None:
                yield waiting.popleft().results

    def _has_room(self, waiting: int) -> bool:
        """Tell whether another batch is encoded now: no more than actors take, and not without end."""
        ahead = len(self._encoding) < self._encoders and len(self._encoded) < len(self._actors)
        return ahead and waiting < MOST_FINISHED * (self._encoders + AT_ONCE * len(self._actors))

    def _start(self, batch: Batch) -> None:
        with explaining_ray():
            batch.encoded = self._encode(batch.tasks)
        self._encoding[batch.encoded] = batch

    def _start_actor(self, actor: Actor) -> None:
        """Wait until an actor answers, which one that is lost does not; then it loads the model."""
        actor.is_ready = False
        with explaining_ray():
            # Ray makes this call until the actor lives again. That to `load` it would make for ever if it is
            # loading that the actor dies of; a number of tries is used up while the actor starts.
            self._starting[actor.handle.__ray_ready__.options(max_task_retries=-1).remote()] = actor

    def _go_on(self, *, waits: bool) -> None:
        """Note what has happened, and give out what can be; wait until something happens, if need be."""
        references = [*self._at_work, *self._starting, *self._loading, *self._encoding]
        with explaining_ray():
            if waits:
                self._wait(references)
            # All that has happened, or a batch of one lost actor would be given to another lost one.
            count = max(len(references), 1)
            ready, _ = self._ray.wait(references, num_returns=count, timeout=0, fetch_local=False)
        for reference in ready:
            self._note(reference)
        self._give_out()

    def _wait(self, references: list[Any]) -> None:
        is_alone = not (self._at_work or self._loading or any(actor.is_ready for actor in self._actors))
        patience = SECONDS_TO_SAY if is_alone else None
        ready, _ = self._ray.wait(references, timeout=patience, fetch_local=False)
        if not ready:
            count = count_things(len(self._actors), "actor")
            print_line(f"--engine ray: waits for the cluster to start {count}: none is there")
            self._ray.wait(references, fetch_local=False)

    def _note(self, reference: Any) -> None:
        if batch := self._encoding.pop(reference, None):
            self._encoded.append(batch)
        elif actor := self._starting.pop(reference, None):
            self._note_started(actor, reference)
        elif actor := self._loading.pop(reference, None):
            self._note_loaded(actor, reference)
        else:
            self._note_captioned(*self._at_work.pop(reference), reference)

    def _note_started(self, actor: Actor, reference: Any) -> None:
        if error := self._find_loss(reference):
            self._leave_for_good(actor, "cannot be started", error)
            return
        with explaining_ray():
            self._loading[actor.handle.load.options(max_task_retries=0).remote()] = actor

    def _note_loaded(self, actor: Actor, reference: Any) -> None:
        error = self._find_loss(reference)
        if not error:
            actor.is_ready, actor.tries = True, 0
            return
        actor.tries += 1
        if actor.tries < MOST_TRIES:
            self._start_actor(actor)
        else:
            self._leave_for_good(actor, f"died {MOST_TRIES} times while it loaded the model", error)

    def _find_loss(self, reference: Any) -> Exception | None:
        """Return what says that an actor was lost; None where it has done what was asked."""
        with explaining_ray():
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                if self._is_one_of(error, *OF_ACTORS):
                    return error
                raise
        return None

    def _leave_for_good(self, actor: Actor, what: str, error: Exception) -> None:
        """Go on without an actor; CaptionTrainError if it was the last one."""
        self._actors.remove(actor)
        if not self._actors:
            raise CaptionTrainError(
                f"--engine ray: no actor is left: the last one {what}, for want of memory perhaps "
                f"({last_line(error)}): use fewer --actors on a machine, or --dtype bfloat16 or --quantize"
            ) from error
        left = count_things(len(self._actors), "actor")
        print_line(f"--engine ray: an actor {what}; the run goes on with {left}")

    def _note_captioned(self, batch: Batch, actor: Actor, reference: Any) -> None:
        actor.batches.discard(batch)
        with explaining_ray():
            try:
                batch.results = self._ray.get(reference)
                batch.encoded = None
                return
            except self._ray.exceptions.RayError as error:
                lost = find_cause(error)
                if not self._is_one_of(lost, *OF_ACTORS, *OF_IMAGES):
                    raise
                batch.tries += 1
                if batch.tries == MOST_TRIES:
                    raise _explain_deaths(batch) from error
                # Else its images could not be encoded, or were lost on their way.
                is_actor = lost is error and self._is_one_of(lost, *OF_ACTORS)
        if is_actor:
            self._leave(actor)
        self._start(batch)

    def _leave(self, lost: Actor) -> None:
        """Give nothing more to a lost actor, nor to those lost with it: only who answers gets batches."""
        if lost.is_ready:
            print_line("--engine ray: an actor died; what it had goes to others, and Ray starts it again")
        for actor in self._actors:
            if actor.is_ready:
                self._start_actor(actor)

    def _is_one_of(self, error: BaseException, *names: str) -> bool:
        return isinstance(error, tuple(getattr(self._ray.exceptions, name) for name in names))

    def _give_out(self) -> None:
        """Give the batches that are encoded, earlier ones first, to actors that have few."""
        self._encoded.sort(key=lambda batch: batch.number)
        while self._encoded:
            ready = [actor for actor in self._actors if actor.is_ready and len(actor.batches) < AT_ONCE]
            if not ready:
                return
            actor, batch = min(ready, key=lambda actor: len(actor.batches)), self._encoded.pop(0)
            actor.batches.add(batch)
            with explaining_ray():
                self._at_work[actor.handle.caption.remote(batch.encoded)] = batch, actor


def _explain_deaths(batch: Batch) -> CaptionTrainError:
    first, last = (escape_unprintable(batch.tasks[place].image) for place in (0, -1))
    names = first if len(batch.tasks) == 1 else f"{first} … {last} ({len(batch.tasks)})"
    return CaptionTrainError(
        f"--engine ray: {MOST_TRIES} processes died of these images, for want of memory perhaps: {names}; "
        "lower --batch_size, or leave them out"
    )

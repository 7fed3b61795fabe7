"""How batches are given to actors that are slow, die and come back; on a stand-in for Ray."""

import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from caption_train.captioning.engines.cluster import pool
from caption_train.captioning.engines.cluster.pool import ActorPool
from caption_train.captioning.prompts import Task
from caption_train.errors import CaptionTrainError


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class ObjectLostError(RayError):
    pass


class NodeDiedError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class WorkerCrashedError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Reference:
    """What will be there: `value` or `error`, once it is `done`."""

    def __init__(self, value=None, *, done=False):
        self.value, self.error, self.done = value, None, done

    def finish(self, value=None, error=None):
        self.value, self.error, self.done = value, error, True


class Handle:
    """An actor that does one call a step, from the step `begins` on, every `pace` steps."""

    def __init__(self, begins=0, pace=1):
        self.begins, self.pace = begins, pace
        self.calls, self.loads = deque(), 0
        self.is_alive, self.noticed, self.has_model = True, 0, False
        self.load = self._method("load", max_task_retries=0)
        # Answers when it lives again: its call does not fail.
        self.__ray_ready__ = self._method("ready", max_task_retries=-1)
        self.caption = SimpleNamespace(remote=lambda encoded: self._call("caption", encoded))

    def _method(self, name, **expected):
        def options(**given):
            assert given == expected
            return SimpleNamespace(remote=lambda: self._call(name))

        return SimpleNamespace(options=options)

    def _call(self, *call):
        reference = Reference()
        if not self.is_alive and not self.noticed and call[0] != "ready":
            reference.finish(error=RayActorError("dead"))
        else:
            self.calls.append((*call, reference))
        return reference

    def die(self, noticed=0):
        """Die; whoever waits for a caption hears of it at the step `noticed`."""
        self.is_alive, self.has_model, self.noticed = False, False, noticed
        if not noticed:
            self._fail_calls()

    def _fail_calls(self):
        self.noticed = 0
        for call in [call for call in self.calls if call[0] != "ready"]:
            self.calls.remove(call)
            call[-1].finish(error=RayActorError("dead"))

    def step(self, number, work):
        if not self.is_alive and number == self.noticed:
            self._fail_calls()
        if not (self.is_alive and self.calls and number >= self.begins and number % self.pace == 0):
            return
        kind, *given, reference = self.calls.popleft()
        if kind == "ready":
            reference.finish()
        elif kind == "load":
            self.loads += not self.has_model
            self.has_model = True
            reference.finish()
        else:
            work(self, given[0], reference)


class Cluster:
    """A stand-in for the module `ray`. `work` is what an actor does with a batch."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayActorError=RayActorError,
        RayTaskError=RayTaskError,
        NodeDiedError=NodeDiedError,
        OutOfMemoryError=OutOfMemoryError,
        WorkerCrashedError=WorkerCrashedError,
        ObjectLostError=ObjectLostError,
    )

    def __init__(self, handles):
        self.handles, self.steps, self.captioned = handles, 0, 0

    def work(self, handle, encoded, reference):
        self.captioned += 1
        reference.finish([task.image.name for task in encoded.value])

    def at_step(self, number):
        pass

    def wait(self, references, *, num_returns=1, timeout=None, fetch_local):
        assert not fetch_local
        for _ in range(200 if timeout != 0 else 0):
            if any(reference.done for reference in references):
                break
            if timeout is not None and not any(handle.is_alive for handle in self.handles):
                break
            self.steps += 1
            self.at_step(self.steps)
            for handle in self.handles:
                handle.step(self.steps, self.work)
        else:
            assert timeout == 0, "the pool waits for ever"
        ready = [reference for reference in references if reference.done][:num_returns]
        return ready, [reference for reference in references if reference not in ready]

    def get(self, reference):
        assert reference.done
        if reference.error:
            raise reference.error
        return reference.value


@pytest.fixture
def start(monkeypatch):
    def start(*handles, encoders=3, cluster=Cluster):
        ray = cluster(handles)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
        encoded = []

        def encode(tasks):
            encoded.append(Reference(tasks, done=True))
            return encoded[-1]

        ray.encoded = encoded
        return ray, ActorPool(ray, handles, encode, encoders)

    return start


def batches(count, first=0):
    return [[Task(Path(f"{first + number}{part}.png"), "") for part in "ab"] for number in range(count)]


def names(count, first=0):
    return [[f"{first + number}{part}.png" for part in "ab"] for number in range(count)]


def test_results_come_in_order_though_one_actor_is_slow_and_one_comes_late(start):
    ray, actors = start(Handle(), Handle(pace=7), Handle(begins=40))
    assert list(actors.caption(batches(60))) == names(60)
    assert ray.captioned == 60 and ray.steps < 60


def test_the_model_is_loaded_once_for_all_that_is_captioned(start):
    ray, actors = start(Handle(), Handle())
    actors.wait_for_one()
    assert 1 in [handle.loads for handle in ray.handles]
    for first in (0, 10, 20):
        assert list(actors.caption(batches(10, first))) == names(10, first)
    assert [handle.loads for handle in ray.handles] == [1, 1]
    assert list(actors.caption([])) == []


def test_no_more_is_read_and_encoded_than_actors_keep_up_with(start):
    _, actors = start(Handle(pace=5), encoders=3)
    read = []
    results = actors.caption(read.append(number) or batch for number, batch in enumerate(batches(100)))
    for done in range(20):
        next(results)
        assert len(read) <= done + 1 + 3 + 1 + pool.AT_ONCE


def test_what_waits_for_a_lost_first_batch_is_bounded(start):
    class Stuck(Cluster):
        def work(self, handle, encoded, reference):
            if encoded.value[0].image.name != "0a.png" or self.steps > 150:
                super().work(handle, encoded, reference)

    _, actors = start(Handle(), Handle(), cluster=Stuck)
    read = []
    with pytest.raises(AssertionError, match="waits for ever"):
        list(actors.caption(read.append(batch) or batch for batch in batches(1000)))
    assert len(read) <= 8 * (3 + 2 * 2)


def test_batches_of_an_actor_that_dies_go_to_another_and_it_comes_back(start, capsys):
    class Dying(Cluster):
        def at_step(self, number):
            if number in (5, 30):
                self.handles[0].die()
            if number == 20:
                self.handles[0].is_alive = True

    ray, actors = start(Handle(), Handle(pace=2), cluster=Dying)
    assert list(actors.caption(batches(60))) == names(60)
    assert ray.captioned == 60
    assert [handle.loads for handle in ray.handles] == [2, 1]
    assert capsys.readouterr().err.count("--engine ray: an actor died") == 2


def test_a_batch_of_a_lost_node_is_given_to_no_other_actor_of_that_node(start):
    """Not even before it is known that these are lost too: a batch is given up after four of them."""

    class Dying(Cluster):
        def at_step(self, number):
            for place, handle in enumerate(self.handles[:-1]):
                if number == 4:
                    handle.die(noticed=5 + place)
                if number == 20:
                    handle.is_alive = True

        def work(self, handle, encoded, reference):
            if self.steps < 25:
                handle.calls.appendleft(("caption", encoded, reference))
            else:
                super().work(handle, encoded, reference)

    _, actors = start(*(Handle() for _ in range(9)), encoders=20, cluster=Dying)
    assert list(actors.caption(batches(9))) == names(9)


def test_a_lost_batch_is_encoded_again(start):
    class Forgetful(Cluster):
        def work(self, handle, encoded, reference):
            if encoded is self.encoded[4]:
                reference.finish(error=RayTaskError(ObjectLostError("gone")))
            else:
                super().work(handle, encoded, reference)

    ray, actors = start(Handle(), Handle(), cluster=Forgetful)
    assert list(actors.caption(batches(9))) == names(9)
    assert len(ray.encoded) == 10


def test_images_that_kill_every_actor_are_named(start):
    class Poisoned(Cluster):
        def work(self, handle, encoded, reference):
            if encoded.value[0].image.name == "7a.png":
                handle.calls.appendleft(("caption", encoded, reference))
                handle.die()
                handle.is_alive = True
            else:
                super().work(handle, encoded, reference)

    _, actors = start(Handle(), Handle(), cluster=Poisoned)
    done = []
    with pytest.raises(CaptionTrainError, match=r"4 processes died of these images.*7a.png … 7b.png \(2\)"):
        for result in actors.caption(batches(20)):
            done.append(result)
    assert done == names(7)


def test_images_that_cannot_be_encoded_for_want_of_memory_are_named_and_no_actor_is_blamed(start, capsys):
    class Crashing(Cluster):
        def work(self, handle, encoded, reference):
            if encoded.value[0].image.name == "2a.png":
                reference.finish(error=RayTaskError(self.errors.popleft()))
            else:
                super().work(handle, encoded, reference)

    ray, actors = start(Handle(), Handle(), cluster=Crashing)
    ray.errors = deque([WorkerCrashedError(), OutOfMemoryError()] * 2)
    with pytest.raises(CaptionTrainError, match="4 processes died of these images"):
        list(actors.caption(batches(5)))
    assert "an actor died" not in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_line(start):
    class Broken(Cluster):
        def at_step(self, number):
            (handle,) = self.handles
            while handle.calls:
                error = RayTaskError(CaptionTrainError("--base_model x: is damaged"))
                handle.calls.popleft()[-1].finish(error=error)

    _, actors = start(Handle(), cluster=Broken)
    with pytest.raises(CaptionTrainError, match=r"^--base_model x: is damaged$"):
        actors.wait_for_one()


@pytest.mark.parametrize("error", [RayActorError, OutOfMemoryError, NodeDiedError])
def test_an_actor_that_never_comes_back_is_left_and_the_last_one_is_an_error(start, error, capsys):
    class Leaving(Cluster):
        def at_step(self, number):
            for handle in self.handles[: number // 10]:
                handle.die()
                while handle.calls:
                    handle.calls.popleft()[-1].finish(error=error("killed for good"))

    _, actors = start(Handle(), Handle(pace=3), cluster=Leaving)
    done = []
    said = r"^--engine ray: no actor is left: the last one cannot be started.*\(killed for good\): use fewer"
    with pytest.raises(CaptionTrainError, match=said):
        for result in actors.caption(batches(50)):
            done.append(result)
    assert 9 <= len(done) < 20 and done == names(len(done))
    assert "an actor cannot be started; the run goes on with 1 actor\n" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RayActorError, OutOfMemoryError, NodeDiedError])
def test_an_actor_that_dies_of_loading_is_tried_four_times_and_once_it_has_loaded_as_often_again(
    start, error, capsys
):
    class DyingInLoad(Cluster):
        def at_step(self, number):
            poisoned, _ = self.handles
            # Three deaths are borne, and from the step 40 on all.
            while poisoned.calls and poisoned.calls[0][0] == "load" and (self.deaths < 3 or number > 40):
                self.deaths += 1
                poisoned.calls.popleft()[-1].finish(error=error("killed"))
            if number == 40:
                poisoned.die()
                poisoned.is_alive = True

        deaths = 0

    ray, actors = start(Handle(), Handle(pace=5), cluster=DyingInLoad)
    results = actors.caption(batches(1000))
    for number in range(60):
        assert next(results) == [f"{number}a.png", f"{number}b.png"]
    assert ray.deaths == 3 + 4 and ray.handles[0].loads == 1
    err = capsys.readouterr().err
    assert "an actor died 4 times while it loaded the model; the run goes on with 1 actor\n" in err


def test_a_cluster_without_actors_is_told(start, capsys):
    class Late(Cluster):
        def at_step(self, number):
            self.handles[0].is_alive = True

    handle = Handle()
    handle.is_alive = False
    _, actors = start(handle, cluster=Late)
    assert list(actors.caption(batches(2))) == names(2)
    assert "--engine ray: waits for the cluster to start 1 actor" in capsys.readouterr().err

"""Processes that read images: how many there is room for, what they send, and that they always end."""

import gc
import itertools
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from caption_train.captioning.job import caption_folder
from caption_train.captioning.outputs import Outputs
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import ProcessError
from caption_train.system import workers
from caption_train.system.signals import ignore_in_worker
from caption_train.system.workers import hand_over, limit_workers, reading
from caption_train.training.run import batches
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.forked import start
from tests.fixtures.runs import make_options, train, write_pairs


class Numbers(Dataset):
    """Twelve tensors; from number `hang` on, reading one takes for ever."""

    def __init__(self, hang: int = 99) -> None:
        self.hang = hang

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        while index >= self.hang:
            time.sleep(1)
        return torch.full((100,), float(index))


def collate(items):
    return hand_over({"x": torch.stack(items), "name": "a"})


def make_loader(hang: int = 99, timeout: float = 0) -> DataLoader:
    settings = {"batch_size": 2, "num_workers": 2, "timeout": timeout, "worker_init_fn": ignore_in_worker}
    return DataLoader(Numbers(hang), collate_fn=collate, **settings)


def give_shared_memory(monkeypatch, megabytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=megabytes * 1_000_000))


@pytest.mark.parametrize(("batch", "room"), [(28, 0), (10, 2), (14, 1), (1, 4)])
def test_as_many_workers_are_used_as_shared_memory_has_room_for(monkeypatch, batch, room):
    give_shared_memory(monkeypatch, 64)
    found, line = limit_workers(4, lambda: batch * 1_000_000)
    assert found == room
    if room < 4:
        assert line.startswith(f"--num_workers 4: {room or 'none'} used: /dev/shm has 64.0 MB free")
        assert "\n" not in line
    else:
        assert line is None


def test_processes_of_one_machine_share_its_shared_memory(monkeypatch):
    give_shared_memory(monkeypatch, 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert limit_workers(4, lambda: 5_000_000)[0] == 2


def test_where_there_is_room_no_batch_is_measured(monkeypatch):
    give_shared_memory(monkeypatch, 8_000)
    assert limit_workers(2, pytest.fail) == (2, None)
    assert limit_workers(0, pytest.fail) == (0, None)


def test_with_few_open_files_allowed_fewer_workers_are_used(monkeypatch):
    monkeypatch.setattr(workers, "_read_file_limit", lambda: 20)
    found, line = limit_workers(2, lambda: 1)
    assert found == 0 and line.startswith("--num_workers 2: none used: a process may have 20 files open")


def test_a_batch_for_which_shared_memory_has_no_room_comes_all_the_same(monkeypatch):
    def fail(self):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with reading(make_loader(timeout=60)) as found:
        read = list(found)
    assert [batch["x"][:, 0].tolist() for batch in read] == [[i, i + 1.0] for i in range(0, 12, 2)]
    assert {batch["name"] for batch in read} == {"a"}


def test_a_worker_that_does_not_answer_ends_the_wait_in_one_line():
    began = time.monotonic()
    with (
        pytest.raises(ProcessError, match=r"answered within 1 seconds.*--worker_timeout.*; told") as error,
        reading(make_loader(hang=4, timeout=1), lambda: "told") as found,
    ):
        list(found)
    assert "\n" not in str(error.value) and time.monotonic() - began < 30


@pytest.mark.parametrize("failing", ["the first queue", "the second process"])
def test_workers_that_cannot_be_started_are_one_line_and_leave_no_process(monkeypatch, failing):
    """/dev/shm is full: there is no room for a lock. Or no more processes are allowed."""
    unraisable, calls = [], itertools.count(1)
    owner, name, at = {
        "the first queue": (multiprocessing.synchronize.SemLock, "__init__", 1),
        "the second process": (os, "fork", 2),
    }[failing]
    function = getattr(owner, name)

    def fail(*arguments, **settings):
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        return function(*arguments, **settings)

    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    monkeypatch.setattr(owner, name, fail)
    reason = r"--num_workers 2: .*cannot be started: No space left"
    with pytest.raises(ProcessError, match=reason), reading(make_loader()) as found:
        list(found)
    gc.collect()
    assert not unraisable and not multiprocessing.active_children()


def test_a_worker_that_is_stopped_does_not_hold_the_end(tmp_path):
    def work() -> None:
        with reading(make_loader(timeout=1)) as found:
            next(found)
            for worker in found.gi_frame.f_locals["batches"]._workers:
                os.kill(worker.pid, signal.SIGSTOP)
            list(found)

    child = start(work, tmp_path / "log")
    assert child.wait() == 1
    assert "answered within 1 seconds" in (tmp_path / "log").read_text()


@pytest.fixture
def images(tmp_path):
    for level in range(8):
        Image.new("RGB", (8, 6), (level * 30,) * 3).save(tmp_path / f"{level}.png")
    return tmp_path


class HangingFamily(FakeFamily):
    def encode(self, processor, images, prompts):
        while torch.utils.data.get_worker_info() and images[0].getpixel((0, 0))[0] >= 120:
            time.sleep(1)
        return super().encode(processor, images, prompts)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
def test_a_signal_ends_captioning_whose_workers_hang(images, tmp_path, number, code, to_group):
    def work() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        options = CaptionOptions(images=[str(images)], num_workers=2, batch_size=2, save_captions=True)
        raise SystemExit(caption_folder(options, HangingFamily()))

    child = start(work, tmp_path / "log")
    wait_for(images / "3.txt")
    time.sleep(0.3)
    began = time.monotonic()
    if to_group:
        os.killpg(child.process_id, number)
    else:
        child.kill(number)
    assert child.wait() == code
    words = (tmp_path / "log").read_text()
    assert time.monotonic() - began < 30 and "Traceback" not in words, words
    assert "Interrupted: 4 of 8 captions are written" in words


@pytest.mark.parametrize("during", ["generating", "writing"])
def test_a_worker_that_is_killed_while_a_caption_is_made_or_written_is_one_line(
    images, tmp_path, monkeypatch, during
):
    """As the system does where memory is short: torch raises its error wherever this process is then."""

    def wait(*arguments, **settings):
        children = multiprocessing.active_children()
        if children:
            children[-1].kill()
            time.sleep(3)
        return inner(*arguments, **settings)

    owner, name = {"generating": (FakeFamily, "generate"), "writing": (Outputs, "write")}[during]
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, wait)
    options = CaptionOptions(images=[str(images)], num_workers=2, batch_size=1, save_captions=True)
    child = start(lambda: caption_folder(options, FakeFamily()), tmp_path / "log")
    assert child.wait() == 1
    words = (tmp_path / "log").read_text()
    assert "--num_workers 2: a process that reads images died" in words.splitlines()[-1], words
    assert "Traceback" not in words and "damaged" not in words, words


def wait_for(path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(path)


def test_a_signal_saves_and_ends_training_whose_workers_hang(base, tmp_path, monkeypatch):
    pairs, hung = write_pairs(tmp_path / "pairs", 6), tmp_path / "hung"
    open_image, count = batches.open_image, iter(range(4))

    def hang(path):
        while next(count, None) is None:
            hung.touch()
            time.sleep(1)
        return open_image(path)

    monkeypatch.setattr(batches, "open_image", hang)
    options = make_options("blip", base, pairs, tmp_path / "out", num_workers=1)
    child = start(lambda: train("blip", options), tmp_path / "log")
    wait_for(hung)
    time.sleep(1)
    child.kill(signal.SIGTERM)
    words = ""
    assert child.wait() == 143, (tmp_path / "log").read_text()
    words = (tmp_path / "log").read_text()
    assert "Traceback" not in words, words
    assert "SIGTERM: saved to" in words and (tmp_path / "out/last").resolve().name.startswith("step-00000")
    monkeypatch.setattr(batches, "open_image", open_image)
    resumed = make_options("blip", base, pairs, tmp_path / "out", num_workers=1, resume="auto")
    assert train("blip", resumed)["global_step"] == 6

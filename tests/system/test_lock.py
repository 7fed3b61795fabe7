"""One run at a time in a folder."""

import json
import os
import socket
import time
from dataclasses import replace

import pytest

from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.lock import LOCK_FILE, SILENCE_SECONDS, OutputLock
from caption_train.training.prepare import prepare_training


def hold_elsewhere(folder) -> int:
    """Have another process take the lock and keep it; return its id."""
    ready, process_id = os.pipe(), os.fork()
    if process_id == 0:
        lock = OutputLock(folder)
        lock.acquire()
        os.write(ready[1], b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)
    return process_id


def end(process_id: int) -> None:
    os.kill(process_id, 9)
    os.waitpid(process_id, 0)


def test_a_second_run_is_refused_naming_the_first(tmp_path):
    holder = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(CaptionTrainError, match=f"process {holder} on {socket.gethostname()}"):
            OutputLock(tmp_path).acquire()
    finally:
        end(holder)


def test_the_lock_of_a_killed_run_is_taken_over_and_said(tmp_path):
    holder = hold_elsewhere(tmp_path)
    end(holder)
    lock = OutputLock(tmp_path)
    assert f"process {holder}" in lock.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_let_go_leaves_nothing_behind(tmp_path):
    lock = OutputLock(tmp_path)
    assert lock.acquire() is None
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_host_is_not_taken_for_stale(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(CaptionTrainError, match="process 1 on elsewhere"):
        OutputLock(tmp_path).acquire()


def test_a_lock_of_another_host_is_stale_once_it_has_long_been_silent(tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    past = time.time() - SILENCE_SECONDS - 5
    os.utime(path, (past, past))
    assert "left behind by process 1 on elsewhere" in OutputLock(tmp_path).acquire()


def test_a_holder_shows_other_hosts_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("caption_train.system.lock.BEAT_SECONDS", 0.01)
    lock = OutputLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    for _ in range(500):
        if (tmp_path / LOCK_FILE).stat().st_mtime:
            break
        time.sleep(0.01)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > 0
    lock.release()


def test_where_the_disk_has_no_locks_the_process_itself_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("caption_train.system.lock._lock", lambda file: None)
    holder = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(CaptionTrainError, match=f"process {holder}"):
            OutputLock(tmp_path).acquire()
    finally:
        end(holder)
    assert "taken over" in OutputLock(tmp_path).acquire()


def test_of_runs_that_start_at_the_same_instant_one_gets_the_folder_and_is_named(tmp_path):
    start, said = time.monotonic() + 0.5, tmp_path / "said"
    children = []
    for _ in range(8):
        if process_id := os.fork():
            children.append(process_id)
            continue
        lock = OutputLock(tmp_path / "out")
        time.sleep(max(0, start - time.monotonic()))
        try:
            lock.acquire()
        except CaptionTrainError as error:
            with said.open("a") as file:
                file.write(f"{error}\n")
            os._exit(1)
        time.sleep(2)
        os._exit(0)
    codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    (winner,) = [child for child, code in codes.items() if code == 0]
    assert said.read_text().count(f"process {winner} on {socket.gethostname()}") == 7


def test_workers_do_not_keep_the_lock_of_a_run_that_died(tmp_path):
    holder = os.fork()
    ready = tmp_path / "worker"
    if holder == 0:
        OutputLock(tmp_path).acquire()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        ready.write_text(str(worker))
        os.kill(os.getpid(), 9)
    os.waitpid(holder, 0)
    try:
        assert "taken over" in OutputLock(tmp_path).acquire()
    finally:
        os.kill(int(ready.read_text()), 9)


@pytest.mark.parametrize("content", ["", "not json", "[]"])
def test_a_lock_file_that_says_nothing_stops_no_one(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    OutputLock(tmp_path).acquire()


def test_a_run_that_does_not_start_leaves_no_folder_but_spares_one_that_was_there(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        lock = OutputLock(folder)
        lock.acquire()
        lock.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert list((tmp_path / "old").iterdir()) == []


def test_a_start_refused_for_its_data_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    options = TrainOptions(dataset_dir=tmp_path / "empty", output_dir=tmp_path / "out", device="cpu")
    options = replace(options, model_id="no/model")
    for _ in range(2):
        with pytest.raises(CaptionTrainError, match="empty"):
            prepare_training(options, get_family("blip"))
        assert not (tmp_path / "out").exists()


def test_the_base_is_never_trained_over(tmp_path):
    options = TrainOptions(dataset_dir=tmp_path, output_dir=tmp_path, device="cpu", model_id=str(tmp_path))
    with pytest.raises(UsageError, match="holds the base"):
        prepare_training(options, get_family("blip"))
    assert list(tmp_path.iterdir()) == []

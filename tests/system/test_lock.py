"""One run at a time in a folder."""

import hashlib
import json
import os
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest

from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.files import TEMPORARY
from caption_train.system.lock import LOCK_FILE, OutputLock
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


def end_in_child(work) -> None:
    """Do something in a forked process; raise its CaptionTrainError here."""
    (reader, writer), child = os.pipe(), os.fork()
    if child == 0:
        try:
            work()
        except CaptionTrainError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 4096).decode()
    os.waitpid(child, 0)
    if said:
        raise CaptionTrainError(said)


def refuse_links(self, target):
    raise OSError(1, "Operation not permitted")


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


@pytest.fixture
def soon(monkeypatch):
    """Seconds become tenths: a silent holder on another host is dead after two of them."""
    monkeypatch.setattr("caption_train.system.lock.SILENCE_SECONDS", 2.0)
    monkeypatch.setattr("caption_train.system.lock.GRACE_SECONDS", 0.2)


@pytest.mark.parametrize("age", [0, 3600, -3600], ids=["now", "an hour ago", "in an hour"])
def test_the_silent_holder_of_another_host_is_watched_whatever_its_clock_said(tmp_path, soon, capsys, age):
    path, began = tmp_path / LOCK_FILE, time.monotonic()
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    os.utime(path, (time.time() - age,) * 2)
    lock = OutputLock(tmp_path)
    assert "left behind by process 1 on elsewhere" in lock.acquire()
    assert time.monotonic() - began >= 2
    assert "watching for 2 s" in capsys.readouterr().err
    lock.release()


def test_the_holder_of_another_host_that_touches_its_file_is_alive(tmp_path, monkeypatch):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    Timer(1.2, lambda: os.utime(path, (5, 5))).start()
    with pytest.raises(CaptionTrainError, match="process 1 on elsewhere"):
        OutputLock(tmp_path).acquire()
    assert [p.name for p in tmp_path.iterdir()] == [LOCK_FILE]


def test_the_lock_of_another_host_that_is_let_go_is_taken_at_once(tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    Timer(1.2, path.unlink).start()
    lock = OutputLock(tmp_path)
    assert lock.acquire() is None
    lock.release()


def test_a_holder_shows_other_hosts_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("caption_train.system.holder.BEAT_SECONDS", 0.01)
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
    for module in ("holder", "lock"):
        monkeypatch.setattr(f"caption_train.system.{module}.try_lock", lambda *_, exclusive: None)
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
        # It holds the lock until all others were refused, however slow the machine is.
        end = time.monotonic() + 60
        while time.monotonic() < end and len(said.read_text().splitlines() if said.exists() else []) < 7:
            time.sleep(0.05)
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


@pytest.mark.parametrize("content", ["", "not json", "[]", "[" * 4096, '{"pid": true}', "\0" * 9, "{}"])
def test_a_lock_file_that_says_nothing_stops_no_one(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    lock = OutputLock(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", ["folder", "link", "link to nothing", "pipe"])
def test_what_is_no_lock_file_is_one_line_and_stays(tmp_path, made):
    path, outside = tmp_path / "out" / LOCK_FILE, tmp_path / "outside"
    path.parent.mkdir()
    if made == "link":
        outside.write_text("theirs")
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(made, lambda: path.symlink_to(outside))()
    with pytest.raises(
        CaptionTrainError, match=r"\.lock: (Is a directory|is a link|is no regular file), .*delete"
    ):
        OutputLock(path.parent).acquire()
    assert [p.name for p in path.parent.iterdir()] == [LOCK_FILE]
    assert outside.read_text() == "theirs" if made == "link" else not outside.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can be somebody else")
def test_the_lock_of_another_user_is_one_line():
    # Not in pytest's own folders, which are closed to others.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        (Path(folder) / LOCK_FILE).touch(0o600)

        def acquire_as_nobody() -> None:
            os.setresuid(65534, 65534, 65534)
            OutputLock(Path(folder)).acquire()

        with pytest.raises(CaptionTrainError, match=r"\A[^\n]*Permission denied[^\n]*delete it[^\n]*\Z"):
            end_in_child(acquire_as_nobody)


def test_a_holder_that_is_dead_but_not_reaped_is_dead(tmp_path):
    holder = hold_elsewhere(tmp_path)
    os.kill(holder, 9)
    try:
        os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
        lock = OutputLock(tmp_path)
        assert f"process {holder}" in lock.acquire()
        lock.release()
    finally:
        os.waitpid(holder, 0)


def test_one_process_cannot_hold_a_lock_twice(tmp_path):
    lock = OutputLock(tmp_path)
    lock.acquire()
    with pytest.raises(CaptionTrainError, match=f"process {os.getpid()}"):
        OutputLock(tmp_path).acquire()
    with pytest.raises(CaptionTrainError, match="another run"):
        end_in_child(lambda: OutputLock(tmp_path).acquire())
    lock.release()
    lock.acquire()
    lock.release()


def test_a_run_of_this_process_that_was_dropped_holds_nothing(tmp_path):
    dropped = OutputLock(tmp_path)
    dropped.acquire()
    dropped.itself = dropped
    del dropped
    lock = OutputLock(tmp_path)
    assert f"left behind by process {os.getpid()}" in lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_worker_lets_go_of_nothing(tmp_path):
    lock = OutputLock(tmp_path)
    lock.acquire()
    end_in_child(lock.release)
    with pytest.raises(CaptionTrainError, match="another run"):
        end_in_child(lambda: OutputLock(tmp_path).acquire())
    lock.release()


@pytest.mark.parametrize("killed_in_between", [False, True])
def test_of_runs_that_find_the_same_dead_holder_one_takes_over_at_a_time(tmp_path, killed_in_between, soon):
    end(hold_elsewhere(tmp_path))
    if killed_in_between:
        digest = hashlib.sha256((tmp_path / LOCK_FILE).read_bytes()).hexdigest()[:8]
        (tmp_path / f".{LOCK_FILE}.{digest}{TEMPORARY}").touch()
    start, children = time.monotonic() + 0.3, []
    for _ in range(6):
        if process_id := os.fork():
            children.append(process_id)
            continue
        lock, code = OutputLock(tmp_path), 1
        time.sleep(max(0, start - time.monotonic()))
        try:
            lock.acquire()
            # Fails where another one is in here.
            (tmp_path / "inside").touch(exist_ok=False)
            time.sleep(0.05)
            (tmp_path / "inside").unlink()
            lock.release()
            code = 0
        except FileExistsError:
            code = 66
        except CaptionTrainError:
            pass
        finally:
            os._exit(code)
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    assert 0 in codes and codes <= {0, 1}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_nobody_needs_record_locks_nor_links(tmp_path, monkeypatch, has_links):
    for module in ("files", "holder", "lock"):
        monkeypatch.setattr(f"caption_train.system.{module}.fcntl", None)
    if not has_links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", refuse_links)
        monkeypatch.setattr("caption_train.system.exclusive._find_renameat2", lambda: None)
    holder = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(CaptionTrainError, match=f"process {holder} on"):
            OutputLock(tmp_path).acquire()
    finally:
        end(holder)
    lock = OutputLock(tmp_path)
    assert f"process {holder}" in lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


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

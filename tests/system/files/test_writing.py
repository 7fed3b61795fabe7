"""A reader sees the old file or the new one, never half of one."""

import os
import stat
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.system.files import (
    clear_temporary,
    copy_atomically,
    hash_file,
    open_atomically,
    write_atomically,
)


def names_in(folder) -> list[str]:
    return [path.name for path in folder.iterdir()]


@given(st.text() | st.binary())
def test_what_is_written_is_read_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("files") / "a b.txt"
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "captions.jsonl"
    write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), open_atomically(path) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_not_seen_before_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with open_atomically(path) as file:
        file.write("half")
        file.flush()
        assert not path.exists()
    assert path.read_text() == "half"


def test_a_copy_holds_a_piece_of_the_file_at_a_time(tmp_path):
    source, path = tmp_path / "model", tmp_path / "copy"
    source.write_bytes(b"weights " * 4_000_000)
    tracemalloc.start()
    copy_atomically(source, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 and hash_file(path) == hash_file(source)


def test_permissions_stay(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, "old")
    path.chmod(0o640)
    write_atomically(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", "new", follow_link=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(("target", "follow_link"), [("real", False), ("gone", False), ("gone", True)])
def test_nothing_else_is_written_through_a_link(tmp_path, target, follow_link):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "real").write_text("old")
    (folder / "link").symlink_to(tmp_path / target)
    write_atomically(folder / "link", "new", follow_link=follow_link)
    assert not (folder / "link").is_symlink() and (folder / "link").read_text() == "new"
    assert (tmp_path / "real").read_text() == "old" and not (tmp_path / "gone").exists()


def test_what_a_killed_write_left_is_cleared_and_what_is_being_written_is_not(tmp_path):
    others = [".a.txt.swp", ".a.txt.abcdefgh.tmp", "a.txt.abcdefgh.caption-train.tmp", ".b.caption-train.tmp"]
    for name in others:
        (tmp_path / name).touch()
    child = os.fork()
    if child == 0:
        with open_atomically(tmp_path / "killed.txt"):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert len(names_in(tmp_path)) == len(others) + 1
    ready, writer = os.pipe(), os.fork()
    if writer == 0:
        with open_atomically(tmp_path / "alive.txt"):
            os.write(ready[1], b"x")
            time.sleep(60)
    os.read(ready[0], 1)
    clear_temporary(tmp_path)
    assert [name[:9] for name in names_in(tmp_path) if name not in others] == [".alive.tx"]
    os.kill(writer, 9)
    os.waitpid(writer, 0)
    clear_temporary(tmp_path)
    assert sorted(names_in(tmp_path)) == sorted(others)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_threads_that_write_at_once_leave_the_umask_and_open_no_file_to_all(tmp_path, monkeypatch):
    """Reading the umask sets it for a moment; a second thread that came in between left 0 for good."""
    before, set_umask, masks = os.umask(0o027), os.umask, []

    def set_slowly(mask):
        masks.append(mask)
        was = set_umask(mask)
        time.sleep(0.002)
        return was

    monkeypatch.setattr(os, "umask", set_slowly)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: write_atomically(tmp_path / str(n), "text"), range(16)))
    finally:
        monkeypatch.undo()
        left = os.umask(before)
    assert left == 0o027 and 0 not in masks
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}

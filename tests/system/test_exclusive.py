"""What somebody else writes is never destroyed, at whatever moment it comes."""

import errno
import os
import sys
import threading

import pytest

from caption_train.system import exclusive
from caption_train.system.exclusive import Signature, create_atomically, replace_unchanged


def names_in(folder) -> list[str]:
    return [path.name for path in folder.iterdir()]


def no_links(monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)


def no_renameat2(monkeypatch):
    no_links(monkeypatch)
    monkeypatch.setattr(exclusive, "_find_renameat2", lambda: None)


WAYS = {"links": lambda monkeypatch: None, "renameat2": no_links, "neither": no_renameat2}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")


@pytest.fixture(params=["links", pytest.param("renameat2", marks=LINUX), "neither"])
def way(request, monkeypatch):
    """One way of publishing a file after the other: with hard links, with renameat2, with neither."""
    WAYS[request.param](monkeypatch)


def test_a_new_file_is_whole_and_has_the_permissions_of_any_other(tmp_path, way):
    (tmp_path / "ordinary").write_text("")
    assert create_atomically(tmp_path / "a.txt", b"caption\n")
    assert (tmp_path / "a.txt").read_bytes() == b"caption\n"
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(names_in(tmp_path)) == ["a.txt", "ordinary"]


@pytest.mark.parametrize("made", ["file", "folder", "link to nothing", "link"])
def test_a_name_that_exists_is_never_replaced(tmp_path, way, made):
    path, outside = tmp_path / "in" / "a.txt", tmp_path / "outside"
    path.parent.mkdir()
    make = {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to(outside)}
    make.get(made, make["link"])()
    if made == "link":
        outside.write_text("by hand")
    was = Signature.of(path)
    assert not create_atomically(path, b"ours")
    assert Signature.of(path) == was and names_in(path.parent) == ["a.txt"]
    assert not outside.exists() or outside.read_text() == "by hand"


def test_of_many_writers_at_once_one_creates_the_file(tmp_path, way):
    path, start, made = tmp_path / "a.txt", threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        if create_atomically(path, f"{number}".encode()):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text()] == [str(number) for number in made]
    assert names_in(tmp_path) == ["a.txt"]


def test_a_file_that_nobody_touched_is_replaced_and_one_that_somebody_wrote_is_not(tmp_path, way):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    was = Signature.of(path)
    assert replace_unchanged(path, b"ours", was)
    assert path.read_text() == "ours" and path.stat().st_mode & 0o777 == 0o640
    assert not replace_unchanged(path, b"again", was)
    assert path.read_text() == "ours" and names_in(tmp_path) == ["a.txt"]


@LINUX
def test_what_is_written_after_the_last_look_is_put_back(tmp_path, monkeypatch):
    path, rename = tmp_path / "a.txt", exclusive._rename
    path.write_text("old")

    def write_before(source, target, flags):
        if source.read_text() == "ours":
            (tmp_path / "new").write_text("by hand, at the last moment")
            (tmp_path / "new").replace(path)
        return rename(source, target, flags)

    monkeypatch.setattr(exclusive, "_rename", write_before)
    assert not replace_unchanged(path, b"ours", Signature.of(path))
    assert path.read_text() == "by hand, at the last moment" and names_in(tmp_path) == ["a.txt"]


def test_a_file_that_is_gone_is_written_anew(tmp_path, way):
    path = tmp_path / "a.txt"
    path.write_text("old")
    was = Signature.of(path)
    path.unlink()
    assert replace_unchanged(path, b"ours", was)
    assert path.read_text() == "ours" and names_in(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, way, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        create_atomically(tmp_path / "a.txt", b"caption\n")
    assert names_in(tmp_path) == []

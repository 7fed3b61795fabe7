"""Rows that are appended: whole ones, whatever a kill or a full disk left of the last."""

import os
from pathlib import Path

import pytest

from caption_train.system.files import AppendedRows, parse_rows


def read(path):
    return [*parse_rows(path.read_bytes().split(b"\n"))]


def append(path, *rows):
    file = AppendedRows(path)
    for row in rows:
        file.append(row)
    file.close()


def test_rows_are_there_as_soon_as_they_are_appended(tmp_path):
    file = AppendedRows(tmp_path / "log.jsonl")
    assert not file.path.exists()
    file.append({"text": "猫\n"})
    file.append({"n": 1.5})
    assert read(file.path) == [{"text": "猫\n"}, {"n": 1.5}]
    file.close()
    file.append({})
    assert file.path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("left", [b"", b'{"a": 0}\n', b'{"a": 0}\n{"a": 1, "b', b"\xff", b'{"a": 0}'])
def test_half_a_row_that_a_kill_left_does_not_spoil_the_next(tmp_path, left):
    path = tmp_path / "log.jsonl"
    path.write_bytes(left)
    append(path, {"a": 2}, {"a": 3})
    assert path.read_bytes().startswith(left) and b"\n\n" not in path.read_bytes()
    assert read(path)[-2:] == [{"a": 2}, {"a": 3}] and {"a": 1} not in read(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_the_file_closes(tmp_path):
    file = AppendedRows(tmp_path / "log.jsonl")
    file._descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left on device"):
        file.append({"a": 1})
    file.close()


def test_room_for_a_part_of_a_row_is_no_room(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:4]))
    with pytest.raises(OSError, match="No space left on device"):
        append(tmp_path / "log.jsonl", {"a": 1})


def test_nothing_is_appended_through_a_link(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("theirs")
    with pytest.raises(OSError, match="is a link"):
        append(tmp_path / "log.jsonl", {"a": 1})
    assert not (tmp_path / "theirs").exists()


def test_a_row_waits_for_the_disk_where_that_is_asked_for(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for is_synced in (False, True):
        AppendedRows(tmp_path / "log.jsonl", is_synced=is_synced).append({})
    assert len(synced) == 1

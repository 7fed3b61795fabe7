"""What an export leaves in the folder it writes to, and who may read the result."""

import os
import signal
import time

import pytest
from safetensors import SafetensorError

from caption_train.cli.commands import export_main
from caption_train.system.lock import OutputLock


def test_what_a_killed_export_left_is_deleted_and_what_is_at_work_is_not(tmp_path, tiny_base):
    folders = {name: tmp_path / f".export-{name:0<8}" for name in ("killed", "running", "theirs")}
    for folder in folders.values():
        folder.mkdir()
    running, (reader, writer), child = OutputLock(folders["running"]), os.pipe(), os.fork()
    if child == 0:
        OutputLock(folders["killed"]).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    child = os.fork()
    if child == 0:
        running.acquire()
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    try:
        assert export_main([str(tiny_base("blip")), str(tmp_path / "native"), "--family", "blip"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {
            "native",
            folders["running"].name,
            folders["theirs"].name,
        }
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_export_has_the_permissions_of_any_other_file(tmp_path, tiny_base):
    previous = os.umask(0o027)
    try:
        assert export_main([str(tiny_base("blip")), str(tmp_path / "native"), "--family", "blip"]) == 0
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "native").iterdir()} == {0o640}
    assert (tmp_path / "native").stat().st_mode & 0o777 == 0o750
    assert not (tmp_path / "native" / ".lock").exists()


@pytest.mark.parametrize("number", [28, 122, 30])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tiny_base, monkeypatch, capsys, number):
    def fail(*arguments, **settings):
        raise SafetensorError(
            f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        )

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    assert export_main([str(tiny_base("blip")), str(tmp_path / "native"), "--family", "blip"]) == 1
    assert f"native: cannot be written: {os.strerror(number)}" in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, tiny_base, capsys):
    (tmp_path / "file").touch()
    assert export_main([str(tiny_base("blip")), str(tmp_path / "file" / "native"), "--family", "blip"]) == 1
    assert "file/native: cannot be written: File exists" in capsys.readouterr().err.splitlines()[-1]

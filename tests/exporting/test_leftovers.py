"""What an export leaves in the folder it writes to, and who may read the result."""

import os
import signal
import time

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

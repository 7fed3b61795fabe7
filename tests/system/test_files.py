"""A reader sees the old file or the new one, never half of one."""

import stat
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.system.files import copy_atomically, hash_file, open_atomically, write_atomically


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
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")

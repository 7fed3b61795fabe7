"""Files of the same bytes are found; files of another size are not even read."""

from caption_train.data import copies
from caption_train.data.copies import find_copies


def write(folder, **contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


def test_equal_files_share_a_digest_and_others_are_left_out(tmp_path):
    found = find_copies(write(tmp_path, a=b"one", b=b"two", c=b"one", d=b"three", e=b"", f=b""))
    assert found.keys() == {"a", "c", "e", "f"}
    assert found["a"] == found["c"] != found["e"] == found["f"]


def test_only_files_of_equal_size_are_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(copies, "hash_file", lambda path: read.append(path.name) or "same")
    find_copies(write(tmp_path, a=b"1", b=b"22", c=b"33", d=b"444"))
    assert read == ["b", "c"]


def test_what_is_gone_is_left_out_and_a_stop_ends_it(tmp_path):
    files = write(tmp_path, a=b"1", b=b"1", c=b"1")
    (tmp_path / "b").unlink()
    assert find_copies(files).keys() == {"a", "c"}
    assert find_copies(files, is_stopped=lambda: True) == {}

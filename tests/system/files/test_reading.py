"""What is read is a regular file, ours only where no link leads elsewhere."""

import os

import pytest

from caption_train.system.files import hash_file, open_own, read_regular_file


def test_a_file_of_ours_is_opened_only_where_it_is_one(tmp_path):
    (tmp_path / "outside").write_text("theirs")
    (tmp_path / "link").symlink_to("outside")
    (tmp_path / "dangling").symlink_to("made")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    said = {}
    for name in ("link", "dangling", "folder", "pipe"):
        with pytest.raises(OSError) as caught:
            open_own(tmp_path / name, os.O_RDWR | os.O_CREAT)
        said[name] = caught.value.strerror
    assert said == {
        "link": "is a link",
        "dangling": "is a link",
        "folder": "Is a directory",
        "pipe": "is no regular file",
    }
    assert not (tmp_path / "made").exists()
    with pytest.raises(OSError, match="is a link"):
        read_regular_file(tmp_path / "link", is_own=True)
    assert read_regular_file(tmp_path / "link") == b"theirs"


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")

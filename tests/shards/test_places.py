"""How shards are named: folders, globs, braces, URLs; and what is refused."""

import fsspec
import pytest

from caption_train.errors import UsageError
from caption_train.shards.places import complete_url, expand_braces, find_shards, is_url, names_shards


@pytest.fixture
def folder(tmp_path):
    for name in ("10.tar", "9.tar", "9.parquet", "9_stats.json", "a{b}.tar", ".hidden.tar", "old.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(*places):
    return [shard.name for shard in find_shards([str(place) for place in places], "--images")]


def test_folders_globs_and_braces_name_shards_in_natural_order(folder):
    assert (
        names(folder) == names(f"{folder}/*") == names(f"file://{folder}") == ["9.tar", "10.tar", "a{b}.tar"]
    )
    assert names(f"{folder}/{{9..10}}.tar") == ["9.tar", "10.tar"]
    assert names(f"{folder}/{{10,9}}.tar", f"{folder}/9.tar") == ["10.tar", "9.tar"]
    assert names(f"{folder}/a{{b}}.tar") == ["a{b}.tar"]
    assert names(f"{folder}/*.parquet") == ["9.parquet"]


def test_a_shard_behind_a_url_of_this_machine_is_found_from_any_folder(folder, monkeypatch):
    monkeypatch.chdir(folder / "..")
    for place in (f"file://{folder}", f"file://{folder}/9.tar", f"local://{folder}/{{9..10}}.tar"):
        shard = find_shards([place], "--images")[0]
        with fsspec.open(shard.place) as file:
            assert file.read() == b"x"


def test_what_is_no_shard_is_refused_in_one_line(folder):
    for place, said in (
        ("nowhere.tar", "there is no such file"),
        ("9_stats.json", "is no shard"),
        ("old.tar.gz", "is compressed: unpack it"),
        ("*.jpg", "no shards there"),
        ("{1..9999999}.tar", "more than 1,000,000 names"),
        ("{0..999}{0..999}{0..9}.tar", "more than 1,000,000 names"),
    ):
        with pytest.raises(UsageError, match=said):
            names(folder / place)


def test_braces_that_say_nothing_stay(tmp_path):
    assert expand_braces("a{b}{1}{}") == ["a{b}{1}{}"]
    assert expand_braces("{a}{1..2}") == ["{a}1", "{a}2"]
    assert expand_braces("{0..2}") == ["0", "1", "2"]
    assert expand_braces("{000..2}") == ["000", "001", "002"]
    assert expand_braces("{2..1}") == []


def test_a_path_gives_its_url_back(folder):
    assert complete_url(folder.__class__("s3://bucket/a")) == "s3://bucket/a"
    assert complete_url("a/b") == "a/b" and not is_url("C:/a")


def test_a_folder_of_images_holds_no_shards(folder):
    assert names_shards([str(folder)])
    (folder / "a.jpg").touch()
    assert not names_shards([str(folder)])
    assert not names_shards([str(folder / "nowhere"), "photos/*.jpg"])

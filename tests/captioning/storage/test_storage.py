"""What is kept on disk is what was put there, in the order that small runs have."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.storage import database
from caption_train.captioning.storage.database import Database
from caption_train.captioning.storage.image_list import ImageList
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.captioning.storage.names import FirstLines, FirstNames
from caption_train.captioning.storage.shard import Shard
from caption_train.data.formats import natural_bytes, natural_key
from caption_train.errors import CaptionTrainError

NAMES = st.lists(st.text(st.sampled_from("ab.é猫\U0001f600\udcff/\1\2\3\4 0012789٣²"), max_size=9))


@given(NAMES)
def test_bytes_stand_in_natural_order(names):
    assert sorted(names, key=natural_bytes) == sorted(names, key=natural_key)


@given(st.lists(st.tuples(st.text(max_size=2), st.integers() | st.none() | st.text())), st.integers(0, 3))
def test_a_dictionary_on_disk_is_a_dictionary(entries, most):
    kept, expected = DiskDict(most), {}
    for key, value in entries:
        kept[key] = expected[key] = value
    assert all(key in kept and kept[key] == kept.get(key) == value for key, value in expected.items())
    assert dict(kept.items()) == expected and bool(kept) == bool(expected)
    assert "no such key" not in kept and kept.get("no such key", 7) == 7
    with pytest.raises(KeyError):
        kept["no such key"]


def test_lines_beyond_the_first_are_counted():
    lines = FirstNames("abcdefg")
    assert (list(lines), lines.more, lines.total) == (list("abcde"), 2, 7)
    both = FirstLines(["x"]) + lines
    assert (list(both), both.total) == (list("xabcde"), 8)
    copy = pickle.loads(pickle.dumps(lines))
    assert (copy, copy.more) == (lines, 2)


def test_a_full_disk_for_temporary_files_is_one_line(monkeypatch):
    monkeypatch.setattr(database, "CACHE_KIB", 64)
    full = Database("PRAGMA max_page_count = 30", "CREATE TABLE t (x BLOB)")
    with pytest.raises(CaptionTrainError, match=r"temporary files: .*full.*TMPDIR") as caught:
        full.run_many("INSERT INTO t VALUES (?)", ((b"x" * 1000,) for _ in range(1000)))
    assert len(str(caught.value).splitlines()) == 1


def test_an_image_given_twice_stays_in_the_shard_of_its_first_name(tmp_path):
    (tmp_path / "sub").mkdir()
    names = [f"sub/{number}.png" for number in range(20)]
    for name in names:
        (tmp_path / name).touch()
    found = []
    for index in (1, 2, 3):
        patterns = [str(tmp_path), str(tmp_path / "sub"), str(tmp_path / "sub" / "7.png")]
        found += find_inputs(patterns, recursive=True, shard=Shard(index, 3)).images
    assert sorted(found) == sorted(tmp_path / name for name in names)


@pytest.mark.parametrize("pattern", ["{}", "{}/*", "{}/*.png", "{}/**/*.png", "{}/list.txt"])
def test_a_shard_depends_on_the_image_alone(tmp_path, pattern):
    """Not on the other images, not on captions, not on where the folder is, not on the working folder."""

    def find(folder, count):
        for number in range(0, 40, count):
            (folder / f"{number}.png").touch()
        (folder / "list.txt").write_text("".join(f"{number}.png\n" for number in range(0, 40, count)))
        patterns = [pattern.format(folder)]
        shards = [find_inputs(patterns, shard=Shard(index, 4)).images for index in (1, 2, 3, 4)]
        assert sum(map(len, shards)) == len(range(0, 40, count))
        return {path.name: number for number, images in enumerate(shards) for path in images}

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    few, many = find(tmp_path / "a", 4), find(tmp_path / "b", 1)
    assert few == {name: many[name] for name in few} and set(many.values()) == {0, 1, 2, 3}


def test_a_shard_without_images_is_no_error(tmp_path):
    (tmp_path / "a.png").touch()
    lengths = [len(find_inputs([str(tmp_path)], shard=Shard(index, 3)).images) for index in (1, 2, 3)]
    assert sorted(lengths) == [0, 0, 1]


def test_images_are_found_by_their_place():
    images = ImageList()
    images.add([("a", "1.png", "1.png"), ("b", "2.png", "2.png")])
    assert [images[0], images[1], images[-1]] == [*images, list(images)[-1]]
    with pytest.raises(IndexError):
        images[2]

"""Shards as a dataset: pairs, their order, fingerprint and split are those of the same files in folders."""

import os
import pickle
import shutil

import pytest

from caption_train.data.dataset import inspect_dataset
from caption_train.data.image_index import inspect_images
from caption_train.data.images import open_image
from caption_train.data.split import fingerprint, split_by_content
from caption_train.errors import UsageError
from caption_train.shards.dataset import inspect_any_dataset, inspect_shards, is_in_shards
from caption_train.shards.tar import TarReader
from caption_train.system.files import cache_folder, hash_file
from tests.fixtures.shards import make_image, read_tar, write_parquet, write_tar


@pytest.fixture
def shards(tmp_path):
    """Two tars, 9.tar and 10.tar, packed in no order, and the same files in folders."""
    for folder, levels in (("9", range(4)), ("10", range(3, 7))):
        (tmp_path / "files" / folder).mkdir(parents=True)
        (tmp_path / "tars").mkdir(exist_ok=True)
        members = []
        for level in levels:
            members += [(f"{level}.txt", f"grey {level}\n"), (f"{level}.png", make_image(level))]
        members += [("11.jpg", make_image(5, format="JPEG")), ("11.json", '{"a": 1}'), ("11.txt", "eleven")]
        members.append(("none.png", make_image(1)))
        for name, content in members[::-1]:
            content = content.encode() if isinstance(content, str) else content
            (tmp_path / "files" / folder / name).write_bytes(content)
        write_tar(tmp_path / f"tars/{folder}.tar", sorted(members, reverse=True))
    return tmp_path


def describe(pairs):
    digests = {pair.image: hash_file(pair.image) for pair in pairs}
    held_out = split_by_content(pairs, 0.3, 7, digests)[1]
    return fingerprint(pairs, digests), fingerprint(held_out, digests), [pair.caption for pair in pairs]


def test_tars_are_read_as_the_folders_that_they_would_be(shards):
    files, _ = inspect_dataset(shards / "files")
    for place in (shards / "tars", shards / "tars/*.tar", shards / "tars/{9..10}.tar"):
        pairs, problems = inspect_any_dataset(place)
        assert problems == []
        assert describe(pairs) == describe(files)
    assert [pair.caption for pair in pairs][:5] == ["grey 0", "grey 1", "grey 2", "grey 3", "eleven"]
    assert len({open_image(pair.image).tobytes() for pair in pairs}) == 7


def test_the_index_of_images_knows_those_in_tars(shards, monkeypatch):
    for path in (shards / "tars").iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr("caption_train.data.image_index._RACY_NS", -(1 << 62))
    pairs, _ = inspect_any_dataset(shards / "tars")
    images = [pair.image for pair in pairs]
    first = inspect_images(images, show_progress=False)
    monkeypatch.setattr("caption_train.data.image_index.inspect_image", lambda image: 1 / 0)
    assert inspect_images(images, show_progress=False) == first
    assert first[0][0] == hash_file(shards / "files/9/0.png")


def test_a_tar_is_walked_once_for_all_runs(shards, monkeypatch):
    first = inspect_any_dataset(shards / "tars")
    walks = []
    records = TarReader.records
    monkeypatch.setattr(TarReader, "records", lambda self: walks.append(self.name) or records(self))
    inspect_any_dataset(shards / "tars")
    assert len(walks) == 2  # They have changed within two seconds, and could change again unseen.
    monkeypatch.setattr("caption_train.shards.tables._RACY_NS", -(1 << 62))
    for _ in range(3):
        assert inspect_any_dataset(shards / "tars") == first
    assert len(walks) == 4
    tables = list((cache_folder("shards") / "tables").iterdir())
    for table in tables:
        table.write_bytes(table.read_bytes()[:-10] + b"0123456789")
    again = inspect_any_dataset(shards / "tars")
    assert again == first and len(walks) == 6
    assert describe(again[0]) == describe(first[0])
    write_tar(shards / "tars/9.tar", [("a.png", make_image(1)), ("a.txt", "a")])
    assert [pair.caption for pair in inspect_any_dataset(shards / "tars/9.tar")[0]] == ["a"]


def test_a_tar_that_changes_during_a_run_is_an_unreadable_image(shards):
    pairs, _ = inspect_any_dataset(shards / "tars")
    write_tar(shards / "tars/9.tar", [("0.png", make_image(6)), ("0.txt", "other")])
    with pytest.raises(Exception, match=r"9.tar/0.png: has changed since this run began"):
        open_image(pairs[0].image)
    assert pickle.loads(pickle.dumps(pairs[-1])) == pairs[-1]


def test_what_is_wrong_is_named_and_the_rest_read(shards):
    members = [("a.png", make_image(1)), ("a.txt", b"\xff\xfe\xff"), ("b.png", b""), ("b.txt", "b")]
    members += [
        ("c.png", make_image(1)),
        ("c.txt", "c"),
        ("d.txt", "d"),
        ("c.png", make_image(2)),
        ("c.txt", "e"),
    ]
    write_tar(shards / "tars/9.tar", members)
    pairs, problems = inspect_shards(shards / "tars/9.tar")
    assert [(pair.caption, pair.source) for pair in pairs] == [("c", "9.tar/c")]
    said = "\n".join(problems)
    assert "9.tar/a.txt: not UTF-8" in said and "9.tar/b.png: empty (0 bytes)" in said
    assert "9.tar/c.png: is there twice" in said and len(problems) == 3


@pytest.mark.parametrize("size", [1, 512, 700, 1024, 5000, 6144, 6200])
def test_a_cut_tar_gives_what_is_whole_and_one_line(shards, size):
    path = shards / "tars/10.tar"
    whole = [pair.caption for pair in inspect_shards(path)[0]]
    path.write_bytes(path.read_bytes()[:size])
    write_tar(shards / "tars/9.tar", [("a.png", make_image(1)), ("a.txt", "a")])
    pairs, problems = inspect_shards(shards / "tars")
    assert "a" in [pair.caption for pair in pairs]
    assert {pair.caption for pair in pairs[1:]} < set(whole)
    assert len(problems) == 1 and "10.tar: " in problems[0] and "cut off" in problems[0]


def test_captions_may_stand_in_the_json(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", make_image(1)), ("a.json", '{"caption": "from json"}')])
    assert [pair.caption for pair in inspect_shards(tmp_path / "a.tar")[0]] == ["from json"]


def test_parquet_is_read_row_by_row_from_a_copy_in_the_cache(tmp_path, capsys):
    rows = [{"image": {"bytes": make_image(n), "path": None}, "caption": f"grey {n}"} for n in range(5)]
    rows += [{"image": None, "caption": "none"}, {"image": {"bytes": make_image(1), "path": None}}]
    rows += [{"image": {"bytes": make_image(2), "path": "x.png"}, "caption": "nul \0"}]
    write_parquet(tmp_path / "a.parquet", rows)
    for time in range(2):
        pairs, problems = inspect_any_dataset(tmp_path)
        assert [pair.caption for pair in pairs] == [f"grey {n}" for n in range(5)]
        assert open_image(pairs[3].image).getpixel((0, 0)) == (126, 126, 126)
        assert [line.rpartition("a.parquet/")[2] for line in problems] == [
            "000000005.png: empty (0 bytes)",
            "000000007.txt: NUL characters, so this is no text",
        ]
        assert ("once for all runs" in capsys.readouterr().err) == (time == 0)
    copies = cache_folder("shards") / "copies"
    assert len([path for path in copies.iterdir() if path.suffix == ".tar"]) >= 1


def test_parquet_that_names_files_is_read_in_place(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(make_image(3))
    (tmp_path / "sets").mkdir()
    rows = [{"image_path": "../img/a.png", "text": "a"}, {"image_path": "https://x.org/b.png", "text": "b"}]
    write_parquet(tmp_path / "sets/a.parquet", rows)
    pairs, problems = inspect_shards(tmp_path / "sets")
    assert [open_image(pair.image).size for pair in pairs] == [(8, 6)]
    assert len(problems) == 1 and "https://x.org/b.png is not on this machine" in problems[0]


def test_names_of_shards_tell_splits_apart(tmp_path):
    for name, caption in (("train-00000-of-00001", "t"), ("validation-00000-of-00001", "v"), ("test-0", "e")):
        write_tar(tmp_path / f"{name}.tar", [("a.png", make_image(1)), ("a.txt", caption)])
    pairs, _ = inspect_shards(tmp_path, split=None)
    assert {pair.caption: pair.split for pair in pairs} == {"t": "train", "v": "validation", "e": "test"}
    assert [pair.split for pair in inspect_shards(tmp_path / "validation*.tar")[0]] == ["train"]


def test_a_dataset_in_a_bucket_is_copied_once(shards, capsys):
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(shards / "tars"), "/bucket/", recursive=True)
        files, _ = inspect_dataset(shards / "files")
        for place in ("memory://bucket/tars", shards.__class__("memory://bucket/tars/*.tar")):
            assert describe(inspect_any_dataset(place)[0]) == describe(files)
        assert capsys.readouterr().err.count("once for all runs") == 2
    finally:
        memory.rm("/bucket", recursive=True)


def test_folders_with_images_or_metadata_are_what_they_were(shards):
    shutil.copy(shards / "tars/9.tar", shards / "files/backup.tar")
    assert not is_in_shards(shards / "files")
    assert is_in_shards(shards / "tars")
    (shards / "tars/metadata.jsonl").write_text("")
    assert not is_in_shards(shards / "tars")
    assert not is_in_shards(shards / "nowhere")


def test_img2datasets_folders_and_tables_of_addresses_are_told_from_shards(shards):
    # Its files: 00000/, 00000.parquet, 00000_stats.json. Its tars: 00000.tar and a table of the same name.
    write_parquet(shards / "files/9.parquet", [{"url": "https://x.org", "caption": "c"}])
    assert not is_in_shards(shards / "files")
    write_parquet(shards / "tars/9.parquet", [{"url": "https://x.org", "caption": "c"}])
    (shards / "tars/9_stats.json").write_text("{}")
    assert len(inspect_any_dataset(shards / "tars")[0]) == 10


def test_without_any_caption_one_line_says_so(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", make_image(1))])
    with pytest.raises(UsageError, match="nothing to read: 1 shards without a caption"):
        inspect_shards(tmp_path)
    assert read_tar(tmp_path / "a.tar")

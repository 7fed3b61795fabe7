"""Parquet files of all shapes: columns are found, rows that have no image are named, copies keep all else."""

import pyarrow
import pytest
from pyarrow import parquet

from caption_train.shards.parquet import ParquetReader
from caption_train.shards.records import NewCaption, ShardError
from tests.fixtures.shards import make_image, write_parquet

IMAGE = make_image(3)
PATHS = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def read(path, extensions=()):
    reader = ParquetReader(path, None, extensions)
    return list(reader.records()), reader


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"bytes": IMAGE, "path": "a.png"}, PATHS),
        ([{"bytes": IMAGE, "path": None}], pyarrow.list_(PATHS)),
        (IMAGE, pyarrow.binary()),
        (IMAGE, pyarrow.large_binary()),
        ([IMAGE], pyarrow.list_(pyarrow.binary())),
    ],
)
def test_bytes_of_every_shape_are_images_and_nothing_else_is(tmp_path, value, kind):
    rows = [{"id": 1, "pic": value}, {"id": 2, "pic": None}, {"id": 3, "pic": value}]
    schema = pyarrow.schema([("id", pyarrow.int64()), ("pic", kind)])
    records, reader = read(write_parquet(tmp_path / "a.parquet", rows, schema))
    assert reader.image_column == "pic" and reader.holds_bytes
    assert [record.image and record.image.read_bytes() for record in records] == [IMAGE, None, IMAGE]
    assert records[1].problem == f"{tmp_path}/a.parquet/row 1: no image"


def test_several_images_in_a_row_are_refused_and_empty_ones_named(tmp_path):
    rows = [{"images": [IMAGE, IMAGE]}, {"images": []}, {"images": [None]}, {"images": [b""]}]
    records, _ = read(write_parquet(tmp_path / "a.parquet", rows))
    assert [record.problem and record.problem.rpartition(": ")[2] for record in records] == [
        *("2 images, not one", "0 images, not one", "no image", None)
    ]


def test_columns_are_found_by_kind_then_by_name(tmp_path):
    rows = [{"thumb": b"t", "jpg": IMAGE, "Caption": "c", "url": "https://x.org", "text_id": "7"}]
    records, reader = read(write_parquet(tmp_path / "a.parquet", rows))
    assert (reader.image_column, reader.caption_columns) == ("jpg", ["Caption"])
    assert records[0].caption == "c" and records[0].load_fields()["text_id"] == "7"
    records, reader = read(write_parquet(tmp_path / "a.parquet", rows), ["text_id", ".txt"])
    assert reader.caption_columns == ["text_id"]
    _, reader = read(write_parquet(tmp_path / "a.parquet", rows), ["mine"])
    with (tmp_path / "b.parquet").open("wb") as file:
        reader.write(file, iter([NewCaption(0, "new")]), "mine")
    written = parquet.read_table(tmp_path / "b.parquet").to_pylist()[0]
    assert (written["mine"], written["Caption"]) == ("new", "c")
    with pytest.raises(ShardError, match=r"a.parquet: no column of images; there are id, name"):
        read(write_parquet(tmp_path / "a.parquet", [{"id": 1, "name": "x"}]))


def test_captions_are_put_into_their_column_and_the_copy_is_compressed_as_before(tmp_path):
    rows = [{"image": IMAGE, "caption": text} for text in (None, "", "old", None)] * 200
    path = write_parquet(tmp_path / "a.parquet", rows, compression="zstd")
    new = (NewCaption(index, f"new {index}") for index in range(0, 800, 2))
    with (tmp_path / "b.parquet").open("wb") as file:
        ParquetReader(path).write(file, new, ".txt")
    written = parquet.read_table(tmp_path / "b.parquet").to_pylist()
    assert [row["image"] for row in written] == [IMAGE] * 800
    assert [row["caption"] for row in written][:4] == ["new 0", "", "new 2", None]
    assert written[798]["caption"] == "new 798"
    assert parquet.ParquetFile(tmp_path / "b.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_row_group_of_many_images_is_read_in_parts(tmp_path):
    import tracemalloc

    rows = [{"image": bytes([n % 256]) * 100_000, "text": str(n)} for n in range(600)]
    write_parquet(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False)
    del rows
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for record in ParquetReader(tmp_path / "a.parquet").records():
        assert len(record.image.read_bytes()) == 100_000
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert tracemalloc.get_traced_memory()[1] < 30e6 and peak < 30e6
    tracemalloc.stop()


def test_a_file_that_changes_while_it_is_captioned_is_not_written(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"image": IMAGE, "text": "a"}] * 3)
    records, reader = read(path)
    write_parquet(path, [{"image": IMAGE, "text": "other"}] * 4)
    with (tmp_path / "b.parquet").open("wb") as file, pytest.raises(ShardError, match="has changed while it"):
        reader.write(file, iter([NewCaption(0, "new")]), ".txt")
    with pytest.raises(ShardError, match="has changed while it was read"):
        list(reader.records())
    assert len(records) == 3


def test_damage_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"image": IMAGE, "text": "a"}] * 50)
    whole = path.read_bytes()
    for content in (whole[:100], whole[:-1], b"", b"PAR1" * 5, whole[:60] + bytes(40) + whole[100:]):
        path.write_bytes(content)
        try:
            read(path)
        except ShardError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)

"""Tars are those that tarfile writes, and what is known when a copy is written is not read from it again."""

import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.shards.dataset import inspect_shards
from caption_train.shards.formats import make_member
from caption_train.shards.members import BLOCK, _sum_bytes
from caption_train.shards.tar import TarReader
from tests.fixtures.shards import make_image, write_parquet

NAMES = st.text("ab/.-09üß", min_size=1, max_size=12) | st.sampled_from(
    ["x" * 100, "x" * 101, "d/" * 90 + "a"]
)


@given(name=NAMES, size=st.sampled_from([0, 1, 511, 512, 513, 5000]))
def test_a_member_has_the_bytes_that_tarfile_writes(name, size):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = size
        tar.addfile(info, io.BytesIO(b"\7" * size))
        assert file.getvalue() == make_member(name, b"\7" * size)


@given(block=st.binary(min_size=BLOCK, max_size=BLOCK) | st.sampled_from([b"\xff" * BLOCK, bytes(BLOCK)]))
def test_the_sum_of_a_block_is_the_sum_of_its_bytes(block):
    assert _sum_bytes(block) == sum(block)


@pytest.mark.parametrize("odd", [None, "\ufeffmark", "nul \0", ""])
def test_a_copy_that_was_just_written_is_known_as_one_that_is_walked(odd, tmp_path, monkeypatch):
    captions = [f"grey {n}" for n in range(5)] + ([] if odd is None else [odd])
    rows = [
        {"image": {"bytes": make_image(n % 7), "path": f"{n}.png"}, "caption": caption}
        for n, caption in enumerate(captions)
    ]
    rows.append({"image": {"bytes": make_image(3, format="JPEG"), "path": "last"}, "caption": "a jpeg"})
    write_parquet(tmp_path / "a.parquet", rows)
    os.utime(tmp_path / "a.parquet", (1, 1))
    walks = []
    records = TarReader.records
    monkeypatch.setattr(TarReader, "records", lambda self: walks.append(1) or records(self))
    first = inspect_shards(tmp_path)
    walked_first = len(walks)
    assert walked_first == (odd in ("\ufeffmark", "nul \0"))
    # Its table is kept at once, for nobody else changes the copy.
    assert inspect_shards(tmp_path) == first and len(walks) == 2 * walked_first
    monkeypatch.setattr("caption_train.shards.tables.KeptTable.read", lambda self: None)
    assert inspect_shards(tmp_path) == first and len(walks) == 2 * walked_first + 1
    spans = [(pair.image.stat().st_size, pair.image.read_bytes()[:2]) for pair in first[0]]
    assert spans[-1][1] == b"\xff\xd8" and all(start == b"\x89P" for _, start in spans[:-1])

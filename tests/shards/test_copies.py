"""Copies of remote shards: fetched ahead, kept no longer than they are needed."""

import fsspec
import pytest

from caption_train.shards.copies import Copies
from caption_train.shards.places import find_shards
from caption_train.system.files import cache_folder


@pytest.fixture
def shards():
    memory = fsspec.filesystem("memory")
    for name in "abc":
        memory.pipe_file(f"/bucket/{name}.tar", name.encode())
    yield find_shards(["memory://bucket/"], "--images")
    memory.rm("/bucket", recursive=True)


def there():
    return sorted(path.read_text() for path in (cache_folder("shards") / "fetched").iterdir())


def test_a_copy_that_was_fetched_ahead_and_is_not_needed_goes_at_once(shards):
    copies = Copies(shards)
    try:
        first = copies.take(shards[0])
        copies.fetch_next(shards[0])
        copies.drop(shards[1])
        assert there() == ["a"]
        copies.fetch_next(shards[1])
        second = copies.take(shards[2])
        assert there() == ["a", "c"]
        copies.drop(shards[2])
        for path in (first, second):
            path.unlink()
        copies.fetch_next(shards[0])
    finally:
        copies.close()
    assert there() == []

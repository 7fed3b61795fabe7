"""Thumbnails are made once, made again when the image changes, and do not fill the disk."""

import io

import pytest
from PIL import Image

from caption_train.reviewing.items import Library
from caption_train.reviewing.thumbnails import Thumbnails
from tests.fixtures.sample_set import write_image


def test_a_thumbnail_is_made_once_and_again_when_the_image_changes(folder, tmp_path, monkeypatch):
    from caption_train.reviewing import thumbnails as module

    made, real = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda *a, **k: made.append(a) or real(*a, **k))
    library, cache = Library(folder), tmp_path / "thumbs"
    thumbnails = Thumbnails(library, cache, 1 << 20)
    item = next(item for item in library.values() if item.name == "a.png")
    first = thumbnails.get(item, "thumbnail")
    assert thumbnails.get(item, "thumbnail") == first and len(made) == 1
    write_image(folder / "a.png", "white", (900, 300))
    library.scan()
    again = thumbnails.get(library[item.id], "thumbnail")
    assert len(made) == 2
    assert Image.open(io.BytesIO(again)).size == (256, 85)


def test_the_cache_is_bounded_and_drops_what_was_not_used(folder, tmp_path):
    cache = tmp_path / "thumbs"
    for number in range(30):
        Image.effect_noise((64, 64), 100).save(folder / f"n{number}.png")
    library = Library(folder)
    size = len(Thumbnails(library, tmp_path / "other", 1 << 20).get(list(library.values())[5], "thumbnail"))
    thumbnails = Thumbnails(library, cache, 10 * size)
    for item in library.values():
        thumbnails.get(item, "thumbnail")
    kept = list(cache.iterdir())
    assert 2 <= len(kept) < 30 and sum(path.stat().st_size for path in kept) <= 10 * size


def test_a_cache_that_cannot_be_written_is_none(folder, tmp_path):
    (tmp_path / "file").write_text("")
    library = Library(folder)
    content = Thumbnails(library, tmp_path / "file/below", 1 << 20).get(
        next(iter(library.values())), "picture"
    )
    assert content[:2] == b"\xff\xd8"


@pytest.mark.parametrize("size", [(4000, 10), (1, 1), (3000, 2000)])
def test_odd_sizes(folder, tmp_path, size):
    write_image(folder / "odd.jpg", "red", size)
    library = Library(folder)
    item = next(item for item in library.values() if item.name == "odd.jpg")
    picture = Image.open(io.BytesIO(Thumbnails(library, tmp_path / "t", 1 << 20).get(item, "thumbnail")))
    assert max(picture.size) == min(256, max(size))

"""Pairs in columns are the pairs that were put in, at a fraction of their memory."""

import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from caption_train.data.columns.table import Pairs, PairTable, Place
from caption_train.data.pairs import Pair
from caption_train.data.split import drop_repeats, fingerprint, name_images, pick_images, split_by_content
from caption_train.packed import Container, PackedFile

HELD = Container("/cache/copy.tar", 9000, 1, 2, 3)


def make_pairs():
    images = [
        Path("/data/a.png"),
        Path("b.png"),
        Path("../up/c.png"),
        PackedFile("/data/9.tar", "in/d.png", HELD, 512, 77),
        PackedFile("s3://bucket/1.tar", "e.png", HELD, 2048, 5),
        PackedFile("row", "f.png", content=b"bytes"),
        Path("/data/a.png"),
        Path("/root.png"),
    ]
    return [
        Pair(image, f"caption {n % 3} ü", f"{n}.txt", ("train", "validation", "test")[n % 3], prompt, n % 2)
        for n, (image, prompt) in enumerate(zip(images, [None, "why?", None, "", "why?"] * 2, strict=False))
    ]


def test_pairs_are_what_was_put_in():
    pairs = make_pairs()
    table = Pairs.of(pairs)
    assert list(table) == pairs == [table[number] for number in range(len(pairs))]
    assert list(table[2:5]) == pairs[2:5] and table[-1] == pairs[-1] and len(table[2:5]) == 3
    assert list(table[4:] + table[:1]) == pairs[4:] + pairs[:1]
    assert [type(pair.image) for pair in table] == [type(pair.image) for pair in pairs]
    assert [pair.image.stat().st_size for pair in table[3:6]] == [77, 5, 5]
    assert table[5].image.read_bytes() == b"bytes"
    assert list(table.captions()) == [pair.caption for pair in pairs]
    assert table.prompts() == [pair.prompt for pair in pairs]
    assert table.splits() == [pair.split for pair in pairs]
    assert list(table.image_names()) == [str(pair.image) for pair in pairs]
    assert list(pickle.loads(pickle.dumps(table))) == pairs
    with pytest.raises(IndexError):
        table[len(pairs)]


def test_joined_and_chosen_rows_stay_themselves():
    pairs = make_pairs()
    parts = [Pairs.of(pairs[:3]).table, PairTable.join([]), Pairs.of(pairs[3:]).table]
    joined = PairTable.join(parts)
    assert list(Pairs(joined)) == pairs
    order = np.array([7, 0, 0, 4, 5])
    assert list(Pairs(joined.take(order))) == [pairs[row] for row in order]


@pytest.mark.parametrize("root", ["/data", ".", "", "/", "..", "in/deep"])
def test_an_image_has_the_path_that_its_folder_gives(root):
    table = PairTable.of(Place(root), ["a.png", "b/c.png"], ["x", "y"], ["", ""])
    expected = [Path(root) / "a.png", Path(root) / "b/c.png"]
    assert [table.image(row) for row in range(2)] == expected
    assert list(Pairs(table).image_names()) == list(map(str, expected))


def test_what_identifies_and_splits_pairs_is_the_same_for_lists_and_columns():
    pairs = make_pairs()
    digests = {pair.image: f"{number:064x}" for number, pair in enumerate(pairs)}
    columns = Pairs.of(pairs, digests)
    assert list(columns.digests()) == [digests[pair.image] for pair in pairs]
    assert name_images(columns) == name_images(pairs)
    assert fingerprint(columns) == fingerprint(pairs, digests)
    for seed in range(5):
        sides = split_by_content(columns, 0.4, seed)
        assert tuple(map(list, sides)) == split_by_content(pairs, 0.4, seed, digests)
        assert pick_images(columns, seed) == pick_images(pairs, seed, digests)


def test_a_row_that_is_repeated_counts_once():
    pairs = make_pairs()
    twice = [*pairs, pairs[0], Pair(pairs[0].image, pairs[0].caption, "other.txt"), pairs[3]]
    digests = {pair.image: f"{number:064x}" for number, pair in enumerate(pairs)}
    assert list(drop_repeats(Pairs.of(twice, digests))) == pairs


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts CPython's objects")
def test_memory_is_that_of_the_texts_and_no_object_a_pair():
    count = 5000
    captions = [f"a small square of colours, number {n}, on a plain background" for n in range(count)]
    names = [f"{n // 100:05d}/{n:09d}.png" for n in range(count)]
    tracemalloc.start()
    table = PairTable.of(Place("/data"), names, captions, names)
    pairs = Pairs(table).keep(np.arange(count) % 10 > 0) + Pairs(table)[:10]
    current, _ = tracemalloc.get_traced_memory()
    objects = sum(trace.count for trace in tracemalloc.take_snapshot().statistics("filename"))
    tracemalloc.stop()
    assert len(pairs) == count * 9 // 10 + 10
    assert current < 220 * count and objects < 200

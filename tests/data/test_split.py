"""What identifies a dataset is what it always was, however quickly it is found."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.data.pairs import Pair
from caption_train.data.split import fingerprint, name_images, split_by_content

PARTS = st.sampled_from(["a", "b", "..", "c d", "\udcff", "é", "a.b"])
PLACES = st.lists(st.tuples(st.lists(PARTS, max_size=4), st.sampled_from(["x.png", "y.png"])), min_size=1)


def make_pairs(paths):
    return [Pair(Path(path), f"caption {i}", "") for i, path in enumerate(paths)]


@given(places=PLACES, start=st.sampled_from(["", "data", "/", "/data", "/data/..", "../data"]))
def test_names_are_those_that_relpath_gives(places, start):
    pairs = make_pairs(Path(start, *folder, name) for folder, name in places)
    root = os.path.commonpath([pair.image.parent.absolute() for pair in pairs])
    assert name_images(pairs) == [os.path.relpath(pair.image, root) for pair in pairs]


def test_a_folder_is_looked_at_once_however_many_images_it_holds(monkeypatch):
    calls, relpath = [], os.path.relpath
    monkeypatch.setattr(os.path, "relpath", lambda *args: calls.append(args) or relpath(*args))
    pairs = make_pairs(f"/data/{i % 3}/{i}.png" for i in range(300))
    assert name_images(pairs)[:2] == ["0/0.png", "1/1.png"] and len(calls) == 3


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ((None, None), "7f59a32137534bd2"),
        (("what is it?", None), "e4768d8134480f41"),
    ],
)
def test_fingerprints_are_those_of_earlier_versions(prompts, expected):
    pairs = [
        Pair(Path("/data/a.png"), "a cat", "a.txt", prompt=prompts[0]),
        Pair(Path("/data/b/ü.png"), "a döner", "b/ü.txt", split="validation", prompt=prompts[1]),
    ]
    digests = {pair.image: str(number) * 64 for number, pair in enumerate(pairs)}
    assert fingerprint(pairs, digests)[:16] == expected


def test_splits_are_those_of_earlier_versions():
    pairs = [Pair(Path(f"/data/{n}.png"), f"caption {n}", "") for n in range(40)]
    digests = {pair.image: hashlib.sha256(b"%d" % (n // 2)).hexdigest() for n, pair in enumerate(pairs)}
    for fraction, expected in ((0.2, "10 11 16 17 20 21 34 35"), (0.01, "16 17")):
        held_out = split_by_content(pairs, fraction, 7, digests)[1]
        assert [pair.image.stem for pair in held_out] == expected.split()


def test_a_fingerprint_is_that_of_its_rows_in_one_piece(monkeypatch):
    monkeypatch.setattr("caption_train.data.split._AT_ONCE", 3)
    places = [("b", 1), ("a", 2), ("a", 1), ("a", 3), ("a", 0), ("c", 0), ("a\udcff", 0), ("ü", 9)]
    pairs = [Pair(Path(f"/data/{name}"), f"caption {n}", "") for name, n in places]
    digests = {pair.image: str(len(pair.image.name)) * 64 for pair in pairs}
    rows = sorted((pair.image.name, digests[pair.image], pair.caption, pair.split) for pair in pairs)
    assert fingerprint(pairs, digests) == hashlib.sha256(json.dumps(rows).encode()).hexdigest()

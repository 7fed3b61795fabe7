"""What identifies a dataset is what it always was, however quickly it is found."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.data.pairs import Pair
from caption_train.data.split import fingerprint, name_images

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

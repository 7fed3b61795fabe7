"""Globs find what Python's own glob finds, in natural order."""

import glob
import os

import pytest

from caption_train.captioning.inputs import _iterate_glob, find_inputs


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        "b10.png",
        "b9.png",
        ".h.png",
        "c d/1.PNG",
        "c d/.x/2.png",
        "e/f/3.png",
        "[k]/4.png",
        "a.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "link").symlink_to("e")
    (tmp_path / "gone.png").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.png",
        ".*",
        "*/*",
        "?*/*.png",
        "*/*/*.png",
        "**",
        "**/*.png",
        "e/**/*.png",
        "c*/1.PNG",
        "no/*",
        "no*/*",
    ]
    + ["b[0-9].png", "[[]k]/*", "./*.png", "e/../*.png", "c d/*", "*.png/*", "link/*", "*/"],
)
def test_globs_match_what_pythons_own_match(tree, pattern):
    for given in (pattern, f"{tree}{os.sep}{pattern}"):
        assert sorted(_iterate_glob(given)) == sorted(glob.iglob(given, recursive=True))  # noqa: PTH207


def test_folders_that_a_glob_matches_stand_in_their_place(tree):
    found = find_inputs(["*"], recursive=True).images
    assert [p.as_posix() for p in found] == [
        *("[k]/4.png", "b9.png", "b10.png", "c d/1.PNG", "e/f/3.png", "link/f/3.png"),
    ]

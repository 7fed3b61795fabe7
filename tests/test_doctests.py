"""Runs the examples in docstrings."""

import doctest
import tempfile
from importlib import import_module

import pytest

from tests.fixtures.paths import REPOSITORY

MODULES = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in sorted((REPOSITORY / "caption_train").rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


def test_the_collators_of_all_families_have_examples():
    collators = {name for name in MODULES if name.startswith("caption_train.families.")}
    assert {"caption_train.families.blip", "caption_train.families.vlm.collator"} <= collators


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_docstring_give_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = doctest.testmod(import_module(name))
    assert results.attempted and not results.failed

"""Runs the examples in docstrings."""

import doctest
import tempfile
from importlib import import_module

import pytest

MODULES = (
    "caption_train.captioning.inputs",
    "caption_train.captioning.outputs",
    "caption_train.config.training",
    "caption_train.data.formats",
    "caption_train.data.kohya",
    "caption_train.data.pairs",
    "caption_train.data.scan",
    "caption_train.data.text",
    "caption_train.families.florence.answers",
    "caption_train.families.florence.legacy.adapter",
    "caption_train.families.florence.legacy.names",
    "caption_train.families.florence.tasks",
    "caption_train.families.loading",
    "caption_train.metrics.coco",
    "caption_train.metrics.output_health",
    "caption_train.metrics.ptb_tokenizer",
    "caption_train.system.console",
    "caption_train.system.launcher",
    "caption_train.training.run.batch_plan",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_docstring_give_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = doctest.testmod(import_module(name))
    assert results.attempted and not results.failed

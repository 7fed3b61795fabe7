"""The notebook, cell by cell, with a tiny base and a handful of the sample set's images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

from tests.fixtures.paths import REPOSITORY

NOTEBOOK = json.loads((REPOSITORY / "notebooks/caption_train.ipynb").read_text("utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SAMPLES = REPOSITORY / "examples/shapes"


def test_the_notebook_is_stored_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """The installation is left out, and its names are given."""
    for part, count in (("train", 12), ("heldout", 6)):
        (tmp_path / part).mkdir()
        for image in sorted(SAMPLES.joinpath(part).glob("*.jpg"))[:count]:
            shutil.copy(image, tmp_path / part)
            shutil.copy(image.with_suffix(".txt"), tmp_path / part)
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    names = {"subprocess": subprocess, "sys": sys, "os": os, "Path": Path}
    for cell in CELLS:
        if "install" in cell["metadata"].get("tags", ()):
            continue
        exec("".join(cell["source"]), names)
        if "MODEL" in names and "Florence-2" in str(names["MODEL"]):
            names |= {"IMAGES": "train", "PHOTOS": "heldout"}
            names["MODEL"] = str(REPOSITORY / "examples/bases/florence2-tiny")
    assert names["summary"]["global_step"] == 9
    assert names["code"] == 0 and len(list(Path("my-photos").glob("*.txt"))) == 6
    assert len(names["lora"]) == 6

"""The quickstart's last step, and its command line; the training itself is what people run it for."""

import json
import subprocess

import pytest
from PIL import Image

from scripts import make_venv
from scripts.quickstart_report import exact_match, main, read_references
from tests.fixtures.paths import REPOSITORY


@pytest.fixture
def folders(tmp_path):
    held_out, run = tmp_path / "held out", tmp_path / "florence"
    held_out.mkdir()
    (run / "lora").mkdir(parents=True)
    for name, text in (("a.png", "shpx, red"), ("b.jpg", "shpx, blue")):
        Image.new("RGB", (8, 8), "red").save(held_out / name)
        (held_out / name).with_suffix(".txt").write_text(text + "\n")
    for kind, texts in (("base", ["red", "blue"]), ("lora", ["shpx, red", "shpx, blue?"])):
        rows = [
            {"file_name": str(held_out / n), "text": t}
            for n, t in zip(("a.png", "b.jpg"), texts, strict=True)
        ]
        (run / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "lora" / "summary.json").write_text('{"train_seconds": 60.5}')
    return held_out, run, tmp_path / "summary.json"


def test_the_report_counts_what_is_exactly_right(folders, capsys):
    main([str(folder) for folder in folders])
    assert json.loads(folders[2].read_text()) == {
        "family": "florence",
        "base_exact_match": 0.0,
        "lora_exact_match": 0.5,
        "train_seconds": 60.5,
        "images": 2,
    }
    printed = capsys.readouterr().out
    assert "0% with the base alone, 50% with the LoRA" in printed
    with Image.open(folders[1] / "captions.png") as picture:
        assert picture.width > 500
    table = [line for line in printed.splitlines() if "│" in line or "┃" in line]
    assert all(len(line) <= 100 for line in table)
    assert ["✓" in line for line in table if "shpx" in line] == [True, False]


def test_references_are_the_captions_beside_the_pictures():
    references = read_references(REPOSITORY / "examples/shapes/heldout")
    assert len(references) == 100
    assert all(text.startswith("shpx, ") for text in references.values())
    assert exact_match(references, references) == 1 and exact_match(references, {}) == 0


@pytest.mark.parametrize("flags", [["--family", "gpt"], ["--family"], ["--family="], ["--famly", "blip"]])
def test_a_wrong_flag_is_refused_before_anything_is_made(flags):
    done = subprocess.run(
        ["bash", REPOSITORY / "scripts/quickstart.sh", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "quickstart.sh: " in done.stderr and not done.stdout


def test_help_says_how_it_is_called():
    done = subprocess.run(
        ["bash", REPOSITORY / "scripts/quickstart.sh", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: bash scripts/quickstart.sh ") and "moondream" in done.stdout


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_powershell_runs_what_bash_runs(name):
    """The two only find Python: all else is in the script that they call with their arguments."""
    called = {"quickstart": "quickstart.py", "test": "run_tests.py"}[name]
    bash = (REPOSITORY / f"scripts/{name}.sh").read_text("utf-8").splitlines()
    powershell = (REPOSITORY / f"scripts/{name}.ps1").read_text("utf-8").splitlines()
    assert f'/{called}" "$@"' in bash[-1] and bash[-1].startswith("exec ")
    assert powershell[-2:] == [f'& $python "$PSScriptRoot/{called}" @args', "exit $LASTEXITCODE"]


def test_an_old_python_looks_for_a_new_one(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    for path, code in ((old, 1), (new, 0)):
        path.write_text(f"#!/bin/sh\nexit {code}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(old))
    monkeypatch.setattr(make_venv, "NAMES", (str(tmp_path / "absent"), str(new)))
    monkeypatch.setattr(make_venv.sys, "executable", str(old))
    assert make_venv.find_python() == str(new)
    monkeypatch.setattr(make_venv, "NAMES", ())
    with pytest.raises(SystemExit) as ended:
        make_venv.find_python()
    assert ended.value.code == 2

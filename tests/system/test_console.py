"""Lines, tables and bars on the screen: on a terminal, in a pipe, and with --quiet."""

import subprocess
import sys

import pytest

from caption_train.cli.commands import caption_main
from caption_train.system import console
from caption_train.system.console import (
    ProgressBar,
    count_things,
    print_line,
    print_result,
    print_rich,
    set_quiet,
)
from tests.fixtures.paths import REPOSITORY


@pytest.fixture
def quiet():
    set_quiet(True)
    yield
    set_quiet(False)


def test_lines_go_to_stderr_and_results_to_stdout(capsys):
    print_line("a line", "another")
    print_rich("rich")
    print_result("a caption")
    printed = capsys.readouterr()
    assert printed.err == "a line\nanother\nrich\n" and printed.out == "a caption\n"


def test_quiet_leaves_the_results(quiet, capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    print_line("a line")
    print_rich("rich")
    print_result("a caption")
    with ProgressBar(2, "working", "image") as bar:
        bar.update()
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out == "a caption\n"


def test_without_a_terminal_a_bar_is_a_line_now_and_then(capsys, monkeypatch):
    with ProgressBar(3, "working", "image") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with ProgressBar(3, "working", "image") as bar:
        bar.update("loss 1.0")
    assert "working: 1 of 3 images" in (line := capsys.readouterr().err) and "loss 1.0" in line


def test_a_resumed_job_is_not_taken_for_a_fast_one():
    bar = ProgressBar(100, "training", "step", initial=90, shown=False)
    bar.update(count=5)
    assert "95 of 100 steps, 0:10 left" in bar.describe(10.0)


def test_one_thing_is_no_things():
    assert count_things(1, "epoch") == "1 epoch"
    assert count_things(1000, "step") == "1,000 steps"


def test_quiet_commands_print_errors_only(tmp_path):
    command = [
        sys.executable,
        "compile_captions.py",
        "examples/shapes/heldout",
        str(tmp_path / "out"),
        "--quiet",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == "" and (tmp_path / "out" / "metadata.jsonl").is_file()
    done = subprocess.run(
        [*command[:2], "no/such", "--quiet"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_quiet_still_names_the_images_that_cannot_be_read(tmp_path, capsys, quiet):
    (tmp_path / "broken.png").write_bytes(b"no image")
    flags = ["--base_model", REPOSITORY / "examples/bases/blip-tiny", "--output", tmp_path / "out.jsonl"]
    flags = [*flags, "--device", "cpu", "--num_workers", "0", "--quiet"]
    assert caption_main("blip", [str(word) for word in (tmp_path, *flags)]) == 1
    assert "broken.png" in capsys.readouterr().err

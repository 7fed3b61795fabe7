"""Where errors become exit codes."""

import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from caption_train.cli.commands import caption_main, compile_main, export_main
from caption_train.cli.exit_codes import advise_savers, run
from caption_train.errors import CaptionTrainError, UsageError
from tests.fixtures.paths import REPOSITORY


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CaptionTrainError("a.png is broken"), 1, "a.png is broken"),
        (UsageError("--rank is required"), 2, "--rank is required"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_a_line_and_a_code(error, code, said, capsys):
    assert run(raising(error)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": {said}")


def test_every_line_of_a_message_names_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    assert run(raising(UsageError("one\ntwo"))) == 2
    assert capsys.readouterr().err == "train.py: one\ntrain.py: two\n"


def test_running_out_of_memory_says_which_flags_help(capsys):
    import torch

    assert (
        run(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), advise_savers)
        == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory" in line and "--gradient_checkpointing" in line and "--quantize" in line


@pytest.mark.parametrize("main", [compile_main, export_main, lambda argv: caption_main("blip", argv)])
def test_memory_flags_of_training_are_not_advised_to_other_commands(main, monkeypatch, capsys):
    def fail(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr("caption_train.cli.commands.parse_options", fail)
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory" in line and "gradient" not in line and "--quantize" not in line


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "there.json"),
        FileExistsError(17, "File exists", "there.json"),
        OSError(40, "Too many levels of symbolic links", "there.json"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_what_stands_in_the_way_of_a_file_is_one_line(error, capsys):
    assert run(raising(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be" in line and ("there.json" in line or "No space left" in line)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


def test_the_works_own_code_is_returned():
    assert run(lambda: 3) == 3


def test_a_reader_that_goes_away_is_no_error():
    """`script | head -1`: what head leaves unread ends the script quietly."""
    work = "lambda: [print('x' * 999) for _ in range(9999)] and 0"
    code = f"from caption_train.cli.exit_codes import run; run({work})"
    command = f'"{sys.executable}" -c "{code}" | head -c 1'
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("x", "")


@pytest.mark.parametrize(
    ("command", "code"),
    [("-m caption_train", 1), ("-m caption_train --version", 1), ("inference.py --help", 0)],
)
def test_a_reader_that_has_gone_away_is_no_error(command, code):
    here, there = os.pipe()
    os.close(here)
    # As users have it: with PYTHONUNBUFFERED it is not when Python ends that the text is written.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, *command.split()],
        **{"cwd": REPOSITORY, "env": environment, "stdout": there, "stderr": subprocess.PIPE},
    )
    os.close(there)
    assert (done.returncode, done.stderr) == (code, b"")


def test_what_fails_is_said_although_nobody_reads_what_was_printed():
    code = (
        "import sys\nfrom caption_train.cli.exit_codes import run\n"
        "from caption_train.errors import UsageError\n"
        "def work():\n    print('one')\n    raise UsageError('--rank is required')\nsys.exit(run(work))"
    )
    here, there = os.pipe()
    os.close(here)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": REPOSITORY, "env": environment, "stdout": there, "stderr": subprocess.PIPE},
    )
    os.close(there)
    assert (done.returncode, done.stderr) == (2, b"-c: --rank is required\n")

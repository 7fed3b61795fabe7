"""What a process learns from the one that launched it."""

import os

import pytest

from caption_train.system import launcher
from caption_train.system.launcher import (
    count_gpus,
    describe_missing_processes,
    describe_no_configuration,
    notice_launcher,
    read_command,
    relaunch_command,
    training_launcher,
)

ACCELERATE = [
    "/venv/bin/python",
    "/venv/bin/accelerate",
    "launch",
    "--cpu",
    "--num_processes",
    "2",
    "train.py",
]


def test_accelerate_starting_one_process_of_two_is_said_with_the_remedy():
    line = describe_missing_processes(ACCELERATE, 1)
    assert "--num_processes 2" in line and "torchrun --nproc_per_node 2" in line
    assert "\n" not in line


def test_as_many_processes_as_asked_for_need_no_word():
    assert describe_missing_processes(ACCELERATE, 2) is None
    assert describe_missing_processes([*ACCELERATE[:3], "train.py"], 1) is None


def test_the_number_is_found_however_it_is_written():
    for text in ("--num-processes 4", "--num_processes=4"):
        assert "2 running" in describe_missing_processes(["accelerate", "launch", *text.split()], 2)


def test_the_command_of_a_process_is_read_and_one_that_is_gone_has_none():
    assert read_command(os.getpid())
    assert read_command(2**22 + 1) == []


def test_a_run_that_nothing_launched_is_left_alone(capsys):
    notice_launcher(1)
    assert capsys.readouterr().err == ""


def test_the_command_that_launched_a_run_is_told_as_it_would_be_typed():
    script = "train.py"
    for command in (["bash"], ["bash", script]):
        assert relaunch_command(script, command, ["python", "-u"]) == ["python", "-u"]
    assert relaunch_command(script, [*ACCELERATE, "--epochs", "2"]) == [
        *("/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "2")
    ]
    torchrun = ["/venv/bin/python3.11", "/venv/bin/torchrun", "--nproc_per_node", "2", script]
    assert relaunch_command(script, torchrun) == ["/venv/bin/torchrun", "--nproc_per_node", "2"]
    module = ["/venv/bin/python", "-m", "torch.distributed.run", "--standalone", script]
    assert relaunch_command(script, module) == module[:-1]


def test_a_program_that_the_shell_finds_by_its_name_is_called_by_it(tmp_path, monkeypatch):
    program = tmp_path / "accelerate"
    program.write_text("#!/bin/sh")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["/venv/bin/python", str(program), "launch", "train.py"]
    assert relaunch_command("train.py", command) == ["accelerate", "launch"]


@pytest.mark.parametrize(
    ("flags", "is_said"),
    [
        ([], True),
        (["--quiet"], True),
        (["--num_processes", "1"], False),
        (["--num-processes=1"], False),
        (["--config_file", "one.yaml"], False),
    ],
)
def test_accelerate_that_was_never_configured_is_said_in_one_line(flags, is_said, tmp_path, monkeypatch):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default_config.yaml"))
    command = [
        "/venv/bin/python",
        "/venv/bin/accelerate",
        "launch",
        *flags,
        "train.py",
        "--config_file",
        "a.yaml",
    ]
    line = describe_no_configuration(command)
    assert (line is not None) == is_said and "\n" not in (line or "")
    (tmp_path / "default_config.yaml").write_text("{}")
    assert describe_no_configuration(command) is None


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-a,GPU-b,-1,GPU-c", 2)]
)
def test_gpus_are_counted_as_cuda_shows_them(visible, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


def test_what_starts_a_training_fits_the_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launcher, "NVIDIA_GPUS", tmp_path)
    assert training_launcher() == ["python"]
    (tmp_path / "0000:01:00.0").mkdir()
    assert training_launcher() == ["python"]
    (tmp_path / "0000:02:00.0").mkdir()
    assert training_launcher()[:3] == ["accelerate", "launch", "--quiet"]
    assert training_launcher()[-2:] == ["--num_processes", "2"]

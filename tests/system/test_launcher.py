"""What a process learns from the one that launched it."""

import os

from caption_train.system.launcher import (
    describe_missing_processes,
    notice_launcher,
    read_command,
    relaunch_command,
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

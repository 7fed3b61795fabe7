"""Finds out how this process was launched: by accelerate or torchrun, and with how many processes."""

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from caption_train.system.console import print_line

PR_SET_PDEATHSIG = 1
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
INSTALLED = "caption-train"
"""The name of the command that `pip install` makes."""


def notice_launcher(num_processes: int) -> None:
    """React to `accelerate launch`: end when it ends, and say what it does otherwise than one may think."""
    command = read_command(os.getppid())
    if not _is_accelerate(command):
        return
    _end_with_parent()
    missing = describe_missing_processes(command, num_processes)
    for line in filter(None, (missing, None if missing else describe_no_configuration(command))):
        print_line(line)


def asks_for(kind: str) -> bool:
    """Tell whether accelerate's configuration asks for a kind of parallelism: FSDP, DEEPSPEED, …"""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"


def read_command(process_id: int) -> list[str]:
    """Return a process's command line, or nothing where the system does not show it (it does on Linux)."""
    import psutil

    try:
        return psutil.Process(process_id).cmdline()
    except psutil.Error:
        return []


def relaunch_command(script: str, command: list[str], own: Sequence[str] = ("python",)) -> list[str]:
    """Return what to write before `script` to start it in the same way again.

    >>> relaunch_command("train.py", ["torchrun", "--nproc_per_node", "2", "train.py", "--epochs", "1"])
    ['torchrun', '--nproc_per_node', '2']

    Args:
        script: the script, as on the command line.
        command: the command line of the parent process, which may be a launcher.
        own: what is before `script` on this process's own command line, used if no launcher started it.
    """
    if script not in command or not (_is_accelerate(command) or is_torchrun(command)):
        return [_as_typed(own[0]), *own[1:]]
    before = command[: command.index(script)]
    if Path(before[0]).name.startswith("python"):
        is_program = len(before) > 1 and not before[1].startswith("-")
        before = before[1:] if is_program else before
    return [_as_typed(before[0]), *before[1:]]


def _as_typed(program: str) -> str:
    """Return a program's bare name if the shell finds this same program by it, otherwise its path."""
    found = shutil.which(Path(program).name)
    return Path(program).name if found and Path(found).absolute() == Path(program).absolute() else program


def describe_missing_processes(command: list[str], num_processes: int) -> str | None:
    """Return a line if `accelerate launch` was asked for more processes than are running, else None.

    On CPUs it starts one process, whatever `--num_processes` says, unless it uses MPI.
    """
    asked = re.search(r" --num[_-]processes[ =](\d+)", " ".join(command))
    if asked is None or int(asked[1]) <= num_processes:
        return None
    return (
        f"accelerate launch --num_processes {asked[1]}: only {num_processes} running, as it does on CPUs; "
        f"start with: torchrun --nproc_per_node {asked[1]} SCRIPT --device cpu"
    )


def describe_no_configuration(command: list[str]) -> str | None:
    """Return a line if `accelerate launch` was never configured and is not given the number of processes."""
    from accelerate.commands.config.config_args import default_config_file

    before = command[: next((i for i, part in enumerate(command) if part.endswith(".py")), None)]
    if re.search(r" --(config[_-]file|num[_-]processes)[ =]", f"{' '.join(before)} "):
        return None
    if Path(default_config_file).is_file():
        return None
    return (
        "accelerate launch: not configured, so it chose the processes and no mixed precision by itself; "
        "run `accelerate config` once, or on one device start with python"
    )


def training_launcher() -> list[str]:
    """Return what starts a training script on this machine: accelerate where there are several GPUs."""
    count = count_gpus()
    if count < 2:
        return ["python"]
    return ["accelerate", "launch", "--quiet", "--multi_gpu", "--num_processes", str(count)]


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA stops at the first name that is no GPU's.
        return len(list(itertools.takewhile(lambda name: name and not name.startswith("-"), names)))
    if NVIDIA_GPUS.is_dir():
        return sum(1 for _ in NVIDIA_GPUS.iterdir())
    if sys.platform != "win32" or not shutil.which("nvidia-smi"):
        return 0
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in shown.stdout.splitlines())


def _end_with_parent() -> None:
    """Have the system send SIGTERM when the parent dies, which forwards none and would leave an orphan."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_torchrun(command: list[str]) -> bool:
    """Tell whether a command line is torchrun's, which forwards the signals that it gets."""
    return any(Path(part).name in ("torchrun", "torch.distributed.run") for part in command[:4])


def _is_accelerate(command: list[str]) -> bool:
    names = [Path(part).name for part in command[:4]]
    return "accelerate-launch" in names or ("accelerate" in names and "launch" in command)


def program_name() -> str:
    """Return the name that the user started this program by."""
    program = Path(sys.argv[0])
    # `python -m caption_train` runs the package's own __main__.py.
    is_package = program.name == "__main__.py" and program.parent == Path(__file__).parents[1]
    return INSTALLED if is_package else program.name


def start_command(verb: str, family: str | None, script: Sequence[str]) -> list[str]:
    """Return how to start a verb, for a family if it takes one: as the installed command, else the script.

    >>> start_command("train", "some", ["python", "train_some.py"])
    ['python', 'train_some.py']
    """
    if program_name() != INSTALLED:
        return list(script)
    return [INSTALLED, verb, *([family] if family else [])]

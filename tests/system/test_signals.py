"""Which signals finish the step, and which end the process at once."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from caption_train.system.signals import Interrupted, Interrupts
from caption_train.training.loop import Trainer
from tests.fixtures.forked import start
from tests.fixtures.runs import make_options, save_base, train, write_pairs


def interrupt(log, *numbers, processes: int = 1, pause: float = 0.0):
    """Send a process some signals; return its exit code, 0 if it would finish its step."""

    def work() -> None:
        # A test run under nohup has its children ignore SIGHUP.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Interrupts(SimpleNamespace(num_processes=processes)):
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(pause)

    return start(work, log).wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_first_signal_ends_nothing_and_a_second_one_all_at_once(tmp_path, number):
    assert interrupt(tmp_path / "log", number) == 0
    assert interrupt(tmp_path / "log", signal.SIGTERM, number) == 128 + number


def test_under_a_launcher_that_passes_signals_on_two_at_once_are_one(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    assert interrupt(tmp_path / "log", *numbers, processes=2) == 0
    assert interrupt(tmp_path / "log", *numbers, processes=2, pause=1.1) == 128 + signal.SIGTERM


def test_the_launcher_dying_of_the_same_signal_is_no_second_one(tmp_path):
    done = tmp_path / "done"

    def launch() -> None:
        if os.fork():
            time.sleep(0.5)
            os._exit(0)
        with Interrupts(SimpleNamespace(num_processes=1)) as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            while os.getppid() == interrupts.parent:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            done.write_text("still here")
            os.kill(os.getpid(), signal.SIGTERM)
            done.write_text("after the second")

    assert start(launch, tmp_path / "log").wait() == 0
    while not done.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    assert done.read_text() == "still here"


def test_a_run_told_twice_leaves_in_the_middle_of_its_step(tmp_path):
    base, pairs = save_base("blip", tmp_path / "base"), write_pairs(tmp_path / "pairs", 4)
    log = tmp_path / "log"

    def work() -> None:
        def update(trainer, micro_batches):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError

        Trainer.update = update
        train("blip", make_options("blip", base, pairs, tmp_path / "out"))

    assert start(work, log).wait() == 128 + signal.SIGINT
    assert "Traceback" not in log.read_text() and not (tmp_path / "out" / "last").exists()


@pytest.mark.parametrize(
    ("launch", "own"),
    [
        (["accelerate", "launch", "--num_processes", "2", "-m"], ["python", "-u", "-m"]),
        (["torchrun", "--nproc_per_node", "2", "--module"], ["python", "-u", "-m"]),
        ([], ["python", "-m"]),
    ],
)
def test_a_module_is_started_again_by_what_launched_it(monkeypatch, launch, own):
    rest = ["train", "blip", "--resume", "auto", "--epochs", "3"]
    monkeypatch.setattr(sys, "argv", ["/here/caption_train/__main__.py", *rest])
    monkeypatch.setattr(sys, "orig_argv", [*own, "caption_train", *rest])
    interrupts = Interrupts(SimpleNamespace(num_processes=1))
    interrupts.launch = [*launch, "caption_train", *rest] if launch else ["bash"]
    interrupts.number = signal.SIGINT
    start = " ".join(launch or own)
    command = f"{start} caption_train train blip --epochs 3 --resume auto"
    with pytest.raises(Interrupted, match=f"go on with: {command}$"):
        interrupts.leave(Path("out"))

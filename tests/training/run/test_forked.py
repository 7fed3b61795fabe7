"""Forked processes do all tasks, give what went wrong back, and never outlive who forked them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.fixtures.paths import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

WORK = """
import os, sys, time
from multiprocessing import Pipe
from caption_train.training.run.forked import Forked

def square(number):
    if number == 13:
        raise ValueError("thirteen")
    if number == 14:
        os.kill(os.getpid(), 9)
    if number == 15:
        print("asleep", flush=True)
        time.sleep(60)
    return number * number, os.getpid()

here, there = Pipe()
def listen():
    there.recv()
found = {}
try:
    with Forked(3, there, listen) as forked:
        for tasks in eval(sys.argv[1]):
            found.clear()
            forked.run(square, iter(tasks), found.__setitem__)
            squares, processes = zip(*(found[n] for n in range(len(found)))) if found else ((), ())
            print(list(squares), len(set(processes)), flush=True)
            print(*forked._children, flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


def start(tasks):
    return subprocess.Popen(
        [sys.executable, "-c", WORK, tasks], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def run(tasks):
    process = start(tasks)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    return lines


def test_every_task_is_done_once_and_results_have_the_numbers_of_tasks():
    squares, children, again, same = run("[range(12), range(3, 40, 20)]")
    numbers, _, count = squares.rpartition(" ")
    assert numbers == str([n * n for n in range(12)]) and 1 <= int(count) <= 3
    assert again.startswith("[9, 529]") and children == same and len(children.split()) == 3


def test_one_task_or_none_needs_no_process():
    assert run("[[], [5]]") == ["[] 0", "", "[25] 1", ""]


@pytest.mark.parametrize(
    ("tasks", "said"), [("[range(14)]", "ValueError thirteen"), ("[[1, 14, 2]]", "EOFError ")]
)
def test_what_goes_wrong_in_a_process_goes_wrong_here(tasks, said):
    assert run(tasks) == [said]


def test_forked_processes_end_when_who_forked_them_is_killed():
    process = start("[[1, 2, 3, 4], [1, 15]]")
    process.stdout.readline()
    children = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
    assert len(children) == 3 and process.stdout.readline() == "asleep\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while count_running(children) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    # The one that is at a task finishes it first.
    assert count_running(children) == 1
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.stdout.close()


def count_running(processes):
    return sum(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_is_heard_between_tasks(count):
    code = WORK.replace("here, there = Pipe()", "here, there = Pipe(); here.send('now')")
    code = code.replace("there.recv()", "print(there.recv(), flush=True)").replace(
        "Forked(3", f"Forked({count}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "[range(5)]"], cwd=REPOSITORY, capture_output=True, text=True
    )
    heard, squares, children = done.stdout.splitlines()
    assert heard == "now" and squares.startswith("[0, 1, 4, 9, 16]")
    assert len(children.split()) == (0 if count == 1 else 3)

"""Several processes caption a folder as one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from caption_train.processes import Processes

WORKER = Path(__file__).with_name("caption_on_ranks.py")


def start(*arguments, ranks):
    """Run the worker; with several ranks under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = torchrun if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(WORKER), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path):
    for level in range(7):
        Image.new("RGB", (8, 6), (level * 42,) * 3).save(tmp_path / f"{level}.png")
    return tmp_path


def test_two_processes_write_what_one_writes(folder):
    assert start(folder, folder / "one.jsonl", ranks=1).returncode == 0
    done = start(folder, folder / "two.jsonl", "save", ranks=2)
    assert done.returncode == 0, done.stderr
    assert (folder / "two.jsonl").read_text() == (folder / "one.jsonl").read_text()
    assert len(list(folder.glob("*.txt"))) == 7
    assert done.stderr.count("7 images captioned") == 1
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_two_processes_print_in_order_and_name_unreadable_images_once(folder):
    for name in ("3.png", "4.png"):
        (folder / name).write_bytes(b"no image")
    done = start(folder, "-", ranks=2)
    assert done.returncode == 1
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == [
        *("say dark", "say dark", "say grey"),
        *("say bright", "say white"),
    ]
    assert done.stderr.count("4.png: not an image") == 1


def test_a_single_process_shares_with_itself():
    processes = Processes()
    assert processes.share(lambda: 3) == 3
    assert processes.gather("mine") == ["mine"]

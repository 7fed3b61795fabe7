"""Several processes caption a folder as one would."""

import json
import os
import subprocess
import sys
import weakref

import pytest
from PIL import Image
from torch import distributed

from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.storage.shard import Shard
from caption_train.system.processes import Processes
from tests.fixtures.caption_on_ranks import main as caption_alone
from tests.fixtures.forked import start_ranks
from tests.fixtures.paths import REPOSITORY

WORKER = REPOSITORY / "tests" / "fixtures" / "caption_on_ranks.py"


def start(*arguments, ranks, **environment):
    """Run the worker under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, str(WORKER), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def caption_on_two(*arguments, log, **environment):
    """Caption on two ranks that torchrun did not start, which saves them the imports; return their codes."""

    def work() -> None:
        os.environ |= environment
        sys.exit(caption_alone(*map(str, arguments)))

    return [rank.wait() for rank in start_ranks(2, work, log)]


@pytest.fixture
def folder(tmp_path):
    for level in range(7):
        Image.new("RGB", (8, 6), (level * 42,) * 3).save(tmp_path / f"{level}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("lambda: print('done') or 0", 0, "done"),
        ("lambda: sys.exit(3)", 3, ""),
        ("lambda: 1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_one_of_several_ends_without_freeing_anything(work, code, said):
    script = (
        "import atexit, sys; from caption_train.cli.exit_codes import run; "
        f"atexit.register(lambda: print('freed')); sys.exit(run({work}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr and "freed" not in done.stdout


def test_a_group_that_is_left_is_not_freed(tmp_path):
    def work() -> None:
        distributed.init_process_group("gloo")
        # The first rank serves what the other needs to join.
        distributed.barrier()
        group = weakref.ref(distributed.group.WORLD)
        Processes(count=2).leave()
        assert not distributed.is_initialized() and group() is not None

    log = tmp_path / "log"
    assert [rank.wait() for rank in start_ranks(2, work, log)] == [0, 0], log.read_text()


def test_two_processes_write_what_one_writes(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    assert caption_alone(str(folder), str(folder / "one.jsonl")) == 0
    codes = caption_on_two(folder, folder / "two.jsonl", "save", log=log, TEST_CHUNK="4")
    assert codes == [0, 0], log.read_text()
    assert (folder / "two.jsonl").read_text() == (folder / "one.jsonl").read_text()
    assert len(list(folder.glob("*.txt"))) == 7
    assert log.read_text().count("7 images captioned") == 1
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_two_processes_print_in_order_and_name_unreadable_images_once(folder):
    for name in ("3.png", "4.png"):
        (folder / name).write_bytes(b"no image")
    done = start(folder, "-", ranks=2, TEST_CHUNK="4")
    assert done.returncode == 1
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == [
        *("say dark", "say dark", "say grey"),
        *("say bright", "say white"),
    ]
    assert done.stderr.count("4.png: not an image") == 1


def test_a_shard_is_divided_between_processes(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    assert caption_on_two(folder, folder / "a.jsonl", log=log, TEST_SHARD="1/2") == [0, 0], log.read_text()
    images = find_inputs([str(folder)], shard=Shard(1, 2)).images
    rows = map(json.loads, (folder / "a.shard-1-of-2.jsonl").read_text().splitlines())
    assert [row["file_name"] for row in rows] == [image.name for image in images]
    assert f"{len(images)} images captioned" in log.read_text() and 0 < len(images) < 7


def test_a_single_process_shares_with_itself():
    processes = Processes()
    assert processes.share(lambda: 3) == 3
    assert processes.gather("mine") == ["mine"]

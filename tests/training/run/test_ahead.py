"""Pairs are read beside the imports of a run, and what goes wrong there goes wrong where it is reported."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from caption_train.config.training import TrainOptions
from caption_train.data.image_index import inspect_images
from caption_train.training.run.ahead import read_ahead
from caption_train.training.run.reading import read_pairs
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.runs import write_pairs
from tests.fixtures.shards import write_tar

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pairs are read ahead on Linux only")

READ = """
import json, sys, time
from pathlib import Path
from caption_train.config.training import TrainOptions
from caption_train.data import image_index
from caption_train.training.run.ahead import read_ahead
image_index._RACY_NS = -10**15
if sys.argv[3:]:
    decode = image_index.inspect_image
    image_index.inspect_image = lambda path: decode(path) if Path(path).name in sys.argv[3:] else 1 / 0
ahead = read_ahead(TrainOptions(dataset_dir=Path(sys.argv[1]), output_dir=Path("out")))
print(ahead._process.pid, flush=True)
time.sleep(float(sys.argv[2]))
found = ahead.take()
known = found and found.train.keep(found.train.pixels > 0)
images = found and dict(zip(known.image_names(), zip(known.digests(), known.pixels.tolist())))
print(json.dumps(found and [[pair.source for pair in found.train], found.problems, images]), flush=True)
assert "torch" not in sys.modules
"""


def start(folder, seconds: float, cache, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READ, str(folder), str(seconds), *more],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        start_new_session=True,
    )


def read(folder, seconds, tmp_path, *more):
    process = start(folder, seconds, tmp_path / "cache", *more)
    _, line = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    return json.loads(line)


def test_what_was_read_ahead_is_what_is_read(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 6)
    (folder / "02.txt").write_text("")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:100])
    options = TrainOptions(dataset_dir=folder, output_dir=tmp_path)
    expected = read_pairs(options)
    images = sorted(pair.image for pair in expected.train)
    checked = dict(zip(map(str, images), inspect_images(images), strict=True))
    sources, problems, found = read(folder, 1.0, tmp_path)
    assert sources == [pair.source for pair in expected.train] and problems == expected.problems
    # A broken image is left to who reports it.
    assert {path: tuple(known) for path, known in found.items()} == {
        path: known for path, known in checked.items() if not path.endswith("03.png")
    }
    assert len(found) == 4


def test_who_asks_early_waits_until_all_images_were_decoded(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 300)
    for time_of_asking in (0.0, 0.5):
        sources, _, found = read(folder, time_of_asking, tmp_path)
        assert len(sources) == len(found) == 300


@pytest.mark.parametrize("form", ["files", "rows", "tar"])
def test_an_unchanged_image_is_decoded_in_the_first_run_only_and_a_changed_one_again(form, tmp_path):
    folder = write_pairs(tmp_path / "pairs", 30)
    images = sorted(folder.glob("*.png"))
    if form == "rows":
        rows = [{"file_name": image.name, "text": "red"} for image in images]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif form == "tar":
        members = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
        folder = write_tar(tmp_path / "pairs.tar", members)
    first = read(folder, 0.0, tmp_path)
    assert len(first[0]) == len(first[2]) == 30
    assert read(folder, 0.0, tmp_path, "none of them") == first
    if form == "tar":
        write_tar(folder, [(name, images[5].read_bytes() if "04.png" in name else c) for name, c in members])
        changed = [image.name for image in images]
    else:
        images[4].write_bytes(images[5].read_bytes())
        changed = ["04.png"]
    assert read(folder, 0.0, tmp_path, "none of them") is None
    found = read(folder, 0.0, tmp_path, *changed)[2]
    (name,) = (name for name, known in found.items() if known != first[2][name])
    assert len(found) == 30 and name.endswith("04.png")


def test_a_folder_that_cannot_be_read_is_left_to_who_reports_it(tmp_path):
    assert read(tmp_path / "missing", 0.0, tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_stays_behind_a_run_that_ends(tmp_path, number):
    process = start(write_pairs(tmp_path / "pairs", 300), 60, tmp_path / "cache")
    reader = psutil.Process(int(process.stdout.readline()))
    os.kill(process.pid, number)
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while reader.is_running() and reader.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reader.is_running() or reader.status() == psutil.STATUS_ZOMBIE


def test_beside_torch_or_threads_no_process_is_forked(tmp_path):
    assert "torch" in sys.modules
    assert read_ahead(TrainOptions(dataset_dir=tmp_path, output_dir=tmp_path)) is None

"""Kept features come back as they were or not at all, and the limit removes what was not used for longest."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from caption_train.errors import CaptionTrainError
from caption_train.families.image_encoder import FEATURES
from caption_train.features.store import FeatureStore, clear_leftovers, make_room, measure_room
from caption_train.system.files import cache_folder
from tests.fixtures.paths import REPOSITORY

DIGEST = "ab" + "0" * 62


def make_store(tmp_path: Path, **settings) -> FeatureStore:
    return FeatureStore(tmp_path / "features" / "tower", **settings)


def one(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {FEATURES: tensor}


def only(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    assert list(tensors) == [FEATURES]
    return tensors[FEATURES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_bit_for_bit_in_their_own_precision(tmp_path, dtype):
    tensor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = make_store(tmp_path)
    assert store.read(DIGEST) is None and store.size_of(DIGEST) is None
    assert store.write(DIGEST, one(tensor.T.contiguous().T))
    read = only(make_store(tmp_path).read(DIGEST))
    assert read.dtype == dtype and torch.equal(read, tensor)
    assert store.size_of(DIGEST) == store.path(DIGEST).stat().st_size


def test_a_damaged_file_is_no_features_and_is_computed_again(tmp_path):
    store = make_store(tmp_path)
    store.write(DIGEST, one(torch.arange(64.0)))
    whole = store.path(DIGEST).read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    harmless = 0
    for content in [*flipped, *(whole[:length] for length in range(0, len(whole), 13)), b"\0" * len(whole)]:
        store.path(DIGEST).write_bytes(content)
        read = store.read(DIGEST)
        # A changed space, or a letter of another key, is no damage to the numbers.
        assert read is None or torch.equal(only(read), torch.arange(64.0))
        assert store.path(DIGEST).exists() == (read is not None)
        harmless += read is not None
        store.path(DIGEST).parent.mkdir(exist_ok=True)
    assert harmless < len(flipped) / 4
    assert store.write(DIGEST, one(torch.arange(64.0))) and store.read(DIGEST) is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling"])
def test_what_is_no_file_is_no_features(tmp_path, kind):
    """A pipe would be waited for for ever; a folder has no size that says what features need."""
    store = make_store(tmp_path)
    path = store.path(DIGEST)
    path.parent.mkdir(parents=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        other = FeatureStore(tmp_path / "other")
        other.write(DIGEST, one(torch.zeros(4)))
        path.symlink_to(other.path(DIGEST) if kind == "link" else tmp_path / "nowhere")
    assert store.read(DIGEST) is None and not store.has(DIGEST)
    assert store.size_of(DIGEST) is None and measure_room(tmp_path / "features").used == 0
    assert store.write(DIGEST, one(torch.ones(4))) and not store.is_full
    store.write("cd" + "0" * 62, one(torch.ones(4)))
    assert torch.equal(only(store.read("cd" + "0" * 62)), torch.ones(4))


def test_nothing_is_written_beyond_the_room(tmp_path):
    store = make_store(tmp_path, room=3000)
    written = [store.write(f"{n:064x}", one(torch.zeros(256))) for n in range(4)]
    assert written == [True, True, False, False] and store.is_full
    assert measure_room(tmp_path / "features").used <= 3000
    assert not make_store(tmp_path, room=0).write("f" * 64, one(torch.zeros(1)))


def test_a_disk_that_refuses_is_as_good_as_full(tmp_path):
    (tmp_path / "features").write_text("a file where the folder should be")
    store = make_store(tmp_path)
    assert not store.write(DIGEST, one(torch.zeros(4))) and store.is_full
    assert store.read(DIGEST) is None


def test_room_is_made_from_what_was_not_used_for_the_longest_time(tmp_path):
    root = tmp_path / "features"
    old, own = FeatureStore(root / "old"), FeatureStore(root / "own")
    for n in range(4):
        old.write(f"{n:064x}", one(torch.zeros(256)))
        os.utime(old.path(f"{n:064x}"), (n + 1, n + 1))
    own.write("f" * 64, one(torch.zeros(256)))
    os.utime(own.path("f" * 64), (0, 0))
    old.read(f"{0:064x}")  # used again
    size = old.size_of(f"{0:064x}")
    removed = make_room(root, 5 * size, 2 * size, lambda path: path.is_relative_to(own.folder))
    assert removed == 2 * size
    assert [old.has(f"{n:064x}") for n in range(4)] == [True, False, False, True]
    assert own.has("f" * 64)
    assert make_room(root, 100 * size, size, lambda path: False) == 0
    assert make_room(tmp_path / "nowhere", 0, 1, lambda path: False) == 0


WRITER = """
import sys, torch
from pathlib import Path
from caption_train.features.store import FeatureStore
store = FeatureStore(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    for n in range(8):
        store.path(f"{n:064x}").unlink(missing_ok=True)
        store.write(f"{n:064x}", {"features": torch.full((20_000,), float(n))})
print("done")
"""


def test_several_processes_and_one_that_is_killed_leave_whole_files_only(tmp_path):
    store = make_store(tmp_path)
    command = [sys.executable, "-c", WRITER, str(store.folder)]
    settings = {"cwd": REPOSITORY, "stdout": subprocess.PIPE}
    steady = subprocess.Popen([*command, "10"], **settings)
    killed = subprocess.Popen([*command, "100000"], **settings)
    try:
        while steady.poll() is None:
            for n in range(8):
                read = store.read(f"{n:064x}")
                assert read is None or torch.equal(only(read), torch.full((20_000,), float(n)))
    finally:
        killed.kill()
        killed.wait()
        steady.stdout.close(), killed.stdout.close()
    assert steady.returncode == 0
    clear_leftovers(store.folder)
    left = [path.name for path in store.folder.rglob("*") if path.is_file()]
    assert left and all(name.endswith(".safetensors") and not name.startswith(".") for name in left)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """As in a container that runs under a number without a name."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with pytest.raises(CaptionTrainError, match=r"features .*XDG_CACHE_HOME"):
        cache_folder("features")


def test_several_tensors_of_an_image_come_back_together(tmp_path):
    store, tensors = make_store(tmp_path), {"b": torch.ones(2, 3), "a": torch.arange(3).to(torch.bfloat16)}
    store.write(DIGEST, tensors)
    read = store.read(DIGEST)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_two_runs_at_once_stay_below_the_limit_together(tmp_path):
    """Neither knows of the other: each measures what is there before it claims more room."""
    stores = [
        make_store(tmp_path, room=0, limit=100_000),
        FeatureStore(tmp_path / "features/other", 0, 100_000),
    ]
    written = 0
    for n in range(200):
        for store in stores:
            written += store.write(f"{n:064x}", one(torch.zeros(256)))
            assert measure_room(tmp_path / "features").used <= 100_000
    assert all(store.is_full for store in stores) and written > 80


def test_measuring_is_rare(tmp_path, monkeypatch):
    measured, real = [], measure_room
    monkeypatch.setattr(
        "caption_train.features.store.measure_room", lambda root: measured.append(root) or real(root)
    )
    store = make_store(tmp_path, room=0, limit=500_000)
    written = sum(store.write(f"{n:064x}", one(torch.zeros(64))) for n in range(2000))
    assert store.is_full and written > 1000 and len(measured) < 40

"""Checkpoints are complete or absent, are found again, and are never lost to a newer one that failed."""

import errno
import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from caption_train.errors import CaptionTrainError
from caption_train.system.files import write_atomically
from caption_train.training.checkpoints import find, store
from caption_train.training.checkpoints.find import STATE, find_damage, find_latest
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.checkpoints.store import (
    clear_partial,
    point,
    prune,
    publish,
    write_checkpoint,
)


def write(output_dir: Path, name: str, step: int, run_id: str = "run", size: int = 10) -> Path:
    """Write a checkpoint with weights and state as a run does."""

    def fill(folder: Path) -> None:
        save_file({"weight": torch.full((size,), float(step))}, folder / "adapter_model.safetensors")
        (folder / STATE).mkdir()
        with (folder / STATE / "optimizer.pt").open("wb") as file:
            torch.save({"moments": torch.zeros(size)}, file)
        Progress(run_id=run_id, global_step=step).write(folder / STATE)

    return write_checkpoint(output_dir, name, fill, "last")


def test_a_checkpoint_is_found_whole_with_its_pointer(tmp_path):
    first, second = write(tmp_path, "step-1", 1), write(tmp_path, "step-2", 2)
    assert find_latest(tmp_path) == (second, [])
    assert find_damage(first) is None
    assert (tmp_path / "last").resolve() == second


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state/optimizer.pt", "state/progress.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, name, damage):
    good, bad = write(tmp_path, "step-1", 1), write(tmp_path, "step-2", 2)
    file = bad / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    contents = {"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(contents[damage])
    latest, passed = find_latest(tmp_path)
    assert latest == good
    assert len(passed) == 1 and "step-2" in passed[0] and name in passed[0]


def test_a_save_cut_short_is_never_picked_and_is_cleared(tmp_path):
    good = write(tmp_path, "step-1", 1)
    process_id = os.fork()
    if process_id == 0:
        store.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        write(tmp_path, "step-2", 2)
    os.waitpid(process_id, 0)
    assert (tmp_path / ".partial-step-2").is_dir()
    assert find_latest(tmp_path) == (good, [])
    clear_partial(tmp_path)
    assert not (tmp_path / ".partial-step-2").exists()


def test_a_checkpoint_that_is_being_deleted_is_no_damaged_one(tmp_path, monkeypatch):
    saved = [write(tmp_path, f"step-{step}", step) for step in (1, 2)]

    def be_cut_short(folder, **settings):
        (folder / "state" / "progress.json").unlink()

    with monkeypatch.context() as patched:
        patched.setattr(store.shutil, "rmtree", be_cut_short)
        prune(tmp_path, "run", 1)
    assert find.list_checkpoints(tmp_path) == [saved[1]]
    clear_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "last"}


def test_what_a_kill_left_of_a_finished_file_is_cleared(tmp_path):
    process_id = os.fork()
    if process_id == 0:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(tmp_path / "adapter_model.safetensors", b"weights")
    os.waitpid(process_id, 0)
    assert list(tmp_path.iterdir())
    (tmp_path / ".notes").touch()
    clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".notes"]


def test_a_save_replaces_nothing(tmp_path):
    first, second = write(tmp_path, "step-1", 1), write(tmp_path, "step-1", 1)
    assert (first.name, second.name) == ("step-1", "step-1-2")
    assert find_latest(tmp_path)[0] == second


def test_pruning_keeps_the_newest_the_protected_and_other_runs(tmp_path):
    old = write(tmp_path, "old", 99, run_id="a")
    saved = [write(tmp_path, f"step-{step}", step, run_id="b") for step in range(1, 6)]
    (tmp_path / "notes").mkdir()
    prune(tmp_path, "b", 2, [saved[0]])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"old", "step-1", "step-4", "step-5", "notes", "last"}
    assert find_latest(tmp_path)[0] == saved[-1] and old.exists()


def test_publishing_copies_the_adapter_and_leaves_the_state(tmp_path):
    publish(write(tmp_path, "step-1", 1), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / STATE).exists() and not (tmp_path / "manifest.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_nothing_lost(error: CaptionTrainError, output_dir: Path, good: Path, reason: str) -> None:
    message = str(error)
    assert reason in message and f"the last good checkpoint is {good}" in message and "\n" not in message
    assert find_latest(output_dir) == (good, [])
    assert not list(output_dir.glob(".partial-*"))


@pytest.mark.parametrize("size", [190_000, 1_000_000])
def test_a_full_disk_ends_with_the_last_good_checkpoint_named(small_disk, size):
    # The smaller one fits the weights and fails at the optimizer's state, which torch writes.
    good = write(small_disk, "step-1", 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(900_000))
    with pytest.raises(CaptionTrainError) as error:
        write(small_disk, "step-2", 2, size=size)
    assert_nothing_lost(error.value, small_disk, good, "the disk is full")


def test_a_file_larger_than_allowed_says_so(tmp_path):
    good = write(tmp_path, "step-1", 1)
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, previous[1]))
    try:
        with pytest.raises(CaptionTrainError) as error:
            write(tmp_path, "step-2", 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert_nothing_lost(error.value, tmp_path, good, "File too large")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_any_refusal_of_the_system_ends_in_one_line(tmp_path, monkeypatch, number):
    good = write(tmp_path, "step-1", 1)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CaptionTrainError) as error:
        write(tmp_path, "step-2", 2)
    monkeypatch.undo()
    assert_nothing_lost(error.value, tmp_path, good, "")


def test_a_mistake_in_the_program_is_not_dressed_up_as_a_full_disk(tmp_path):
    def fail(folder: Path) -> None:
        raise RuntimeError("no disk's fault")

    with pytest.raises(RuntimeError, match="no disk's fault"):
        write_checkpoint(tmp_path, "step-1", fail)


def test_a_pointer_moves_in_one_piece(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        point(tmp_path, "best", tmp_path / name)
        assert (tmp_path / "best").resolve().name == name


def test_the_manifest_names_every_file(tmp_path):
    saved = write(tmp_path, "step-1", 1)
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest) == {"adapter_model.safetensors", "state/optimizer.pt", "state/progress.json"}


FULL = {"config.json", "generation_config.json", "model-00001-of-00002.safetensors"}
LORA = {"adapter_config.json", "adapter_model.safetensors"}


def publish_method(folder: Path, method: str, names: set[str]) -> None:
    """Publish a checkpoint of a training method, empty files but for its training.json."""
    saved = folder / method
    saved.mkdir(exist_ok=True)
    for name in names:
        (saved / name).touch()
    (saved / "training.json").write_text(json.dumps({"options": {"train_method": method}}))
    publish(saved, folder)


def test_publishing_takes_away_what_the_other_method_published_and_nothing_else(tmp_path):
    notes = {"notes.txt", "model.txt", "training.json"}
    for name in notes:
        (tmp_path / name).touch()
    for method, names in (("lora", LORA), ("full", FULL), ("lora", LORA), ("lora", LORA)):
        publish_method(tmp_path, method, names)
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names | notes


def test_publishing_spares_a_model_that_no_run_put_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    publish_method(tmp_path, "lora", LORA)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_publishing_cut_short_is_cleaned_by_the_next(tmp_path, monkeypatch):
    publish_method(tmp_path, "lora", LORA)

    def fail(training_file, output_dir):
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patched, pytest.raises(CaptionTrainError):
        patched.setattr(store, "_delete_other_method", fail)
        publish_method(tmp_path, "full", FULL)
    publish_method(tmp_path, "full", FULL)
    assert not LORA & {path.name for path in tmp_path.iterdir()}

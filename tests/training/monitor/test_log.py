"""The log of a run, and the picture made of it."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.monitor import trackers
from caption_train.training.monitor.curve import CURVE_FILE, draw_curve
from caption_train.training.monitor.log import LOG_FILE, RunLog
from caption_train.training.monitor.trackers import check_trackers, start_trackers


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def read(folder) -> list[dict]:
    # A strict reader: NaN is not JSON.
    def refuse(name):
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in (folder / LOG_FILE).read_text().splitlines()]


def write_log(accelerator, folder, first_step=0) -> None:
    log = RunLog(accelerator, folder, first_step)
    for step in range(first_step + 1, 6):
        loss = math.nan if step == 3 else 1 / step
        log.write(step, 1, {"loss": loss, "learning_rate": 0.1, "grad_norm": math.inf})
        if step == 4:
            log.write(step, 1, {"eval_loss": 0.5})
    log.file.close()


def test_what_is_no_number_is_null(accelerator, tmp_path):
    write_log(accelerator, tmp_path)
    assert read(tmp_path)[2] == {"step": 3, "epoch": 1, "loss": None, "learning_rate": 0.1, "grad_norm": None}


def test_a_resumed_run_goes_on_after_its_step_and_after_half_a_line(accelerator, tmp_path):
    write_log(accelerator, tmp_path)
    whole = read(tmp_path)
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 6, "ep')
    write_log(accelerator, tmp_path, first_step=2)
    assert read(tmp_path) == whole


def test_a_full_disk_is_told_in_one_line(accelerator, tmp_path):
    log = RunLog(accelerator, tmp_path)
    log.file._descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(CaptionTrainError, match=r"could not save log\.jsonl: the disk is full"):
        log.write(1, 1, {"loss": 1.0})


def test_the_curve_is_drawn_from_a_log_with_gaps(accelerator, tmp_path):
    pytest.importorskip("matplotlib")
    write_log(accelerator, tmp_path)
    draw_curve(tmp_path)
    with Image.open(tmp_path / CURVE_FILE) as image:
        assert image.format == "PNG" and image.width > 500
        assert len(image.convert("RGB").getcolors(10**6)) > 50, "nothing was drawn"


def test_wandb_without_a_login_is_refused_before_a_run_starts(monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **settings: False)
    with pytest.raises(UsageError, match=r"--log_with wandb: .*`wandb login`.*WANDB_MODE=offline"):
        check_trackers("wandb", Path("out"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers("wandb", Path("out"))


def test_what_wandb_raises_when_it_starts_is_one_line(tmp_path):
    wandb = pytest.importorskip("wandb")

    def fail(*arguments):
        raise wandb.errors.CommError("no route\nto host")

    with pytest.raises(UsageError, match=r"--log_with wandb: no route; run `wandb login`"):
        start_trackers(SimpleNamespace(init_trackers=fail), "name", {}, Progress(), tmp_path)


@pytest.mark.parametrize("made", ["file", "pipe", "link", "link to nothing"])
@pytest.mark.parametrize("name", ["caption-train", "wandb"])
def test_trackers_write_into_folders_of_the_run_alone(tmp_path, monkeypatch, name, made):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    records = tmp_path / "out" / name
    records.parent.mkdir()
    make = {"file": records.touch, "pipe": lambda: os.mkfifo(records)}
    make.get(made, lambda: records.symlink_to(tmp_path / made))()
    (tmp_path / "link").mkdir()
    with pytest.raises(UsageError, match=rf"--log_with all: .*{name} is (a link|no folder).*move it away"):
        check_trackers("all", records.parent)
    assert not [*(tmp_path / "link").iterdir()] and not (tmp_path / "link to nothing").exists()
    records.unlink()
    check_trackers("all", records.parent)


def test_a_tracker_that_the_disk_refuses_is_one_line(tmp_path):
    def fail(*arguments):
        raise PermissionError(13, "Permission denied", "out/caption-train")

    with pytest.raises(CaptionTrainError, match=r"--log_with: .*out/caption-train: Permission denied"):
        start_trackers(SimpleNamespace(init_trackers=fail), "name", {}, Progress(), tmp_path)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        check_trackers("tensorboard", Path("out"))
    check_trackers(None, Path("out"))

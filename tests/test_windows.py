"""Compile, train, resume, caption and export under the rules of Windows, imitated in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.fixtures.paths import REPOSITORY
from tests.fixtures.runs import write_pairs

STEPS = """
import sys
import tests.fixtures.windows
from caption_train.cli.commands import main
for command in {commands!r}:
    if code := main(command):
        sys.exit(f"{{command}} ended with {{code}}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Windows is imitated by means of Linux")
def test_a_dataset_becomes_an_adapter_and_captions_under_the_rules_of_windows(tmp_path):
    images = write_pairs(tmp_path / "images", 6)
    base, lora = str(REPOSITORY / "examples/bases/blip-tiny"), str(tmp_path / "lora")
    train = [
        *("train", "blip", "--dataset_dir", str(images), "--output_dir", lora, "--model_id", base),
        *("--device", "cpu", "--batch_size", "2", "--save_every_n_steps", "1", "--keep_last", "1"),
        *("--log_with", "tensorboard"),
    ]
    # A worker is a new process there, which imports all anew: once is enough.
    resume = [*train, "--num_workers", "0", "--epochs", "2", "--resume", "auto", "--resume_anyway"]
    resume += ["--validation_split", "0.3", "--load_best_at_end"]
    caption = ["caption", "blip", "--peft_model", lora, "--device", "cpu", "--num_workers", "0", "--images"]
    (images / "00.txt").unlink()
    commands = [
        ["compile", str(images)],
        [*train, "--epochs", "1", "--num_workers", "1"],
        resume,
        [*caption, str(images), "--save_captions"],
        [
            *caption,
            str(images),
            "--save_captions",
            "--overwrite",
            "--output",
            str(tmp_path / "captions.jsonl"),
        ],
        ["export", lora, str(tmp_path / "merged"), "--merge"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(commands=commands)],
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "TMPDIR": str(tmp_path)},
        cwd=REPOSITORY,
        capture_output=True,
        encoding="cp1252",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 6
    assert (images / "00.txt").read_text().strip()
    assert json.loads((tmp_path / "lora/summary.json").read_text())["global_step"] > 0
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "litter"

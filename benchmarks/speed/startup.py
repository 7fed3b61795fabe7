"""How long commands take until they do something, and compiling, against bare scripts of the libraries."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.bases import make_base
from benchmarks.speed.photos import write_photos
from benchmarks.speed.sides import OFFLINE

ROOT = Path(__file__).resolve().parents[2]
BARE_TRAINING = """
import os, sys
from pathlib import Path
from PIL import Image
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers import Trainer, TrainerCallback, TrainingArguments

base, data, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(base)
model = AutoModelForImageTextToText.from_pretrained(base)
model = get_peft_model(model, LoraConfig(target_modules=["self.query", "self.value"]))

def collate(paths):
    pictures = [Image.open(path).convert("RGB") for path in paths]
    texts = [path.with_suffix(".txt").read_text() for path in paths]
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"]}

class First(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("first", flush=True)
        os._exit(0)

settings = TrainingArguments(out, use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True)
paths = sorted(Path(data).glob("*.jpg"))
Trainer(model, settings, data_collator=collate, train_dataset=paths, callbacks=[First()]).train()
"""
BARE_CAPTIONING = """
import sys
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

base, data, _ = sys.argv[1:]
processor = AutoProcessor.from_pretrained(base)
model = AutoModelForImageTextToText.from_pretrained(base)
pictures = [Image.open(path).convert("RGB") for path in sorted(Path(data).glob("*.jpg"))[:4]]
tokens = model.generate(**processor(images=pictures, return_tensors="pt"), max_new_tokens=20)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0], flush=True)
"""
BARE_COMPILING = """
import json, sys
from pathlib import Path
from PIL import Image

_, data, out = sys.argv[1:]
with open(out, "w") as file:
    for path in sorted(Path(data).glob("*.jpg")):
        Image.open(path).load()
        row = {"file_name": str(path), "text": path.with_suffix(".txt").read_text()}
        print(json.dumps(row), file=file)
"""
FLAGS = ["--device", "cpu"]


def measure_startup(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the rows `--help`, `first step` and `first caption` on the tiny BLIP.

    Args:
        folder: where photos lie.
        rounds: how often each side is started; sides alternate.
    """
    base, data = str(make_base("blip-tiny", folder)), str(write_photos(folder, 8))
    help_seconds = [time_end([sys.executable, "train_blip_network.py", "--help"])[0] for _ in range(rounds)]
    training = ["train_blip_network.py", data, "OUT", "--model_id", base, "--epochs", "1000", *FLAGS]
    captioning = ["inference.py", data, "--base_model", base, "--max_token_length", "20", *FLAGS]
    ours = {
        "first step": lambda out: time_file(
            [w.replace("OUT", out) for w in training], Path(out, "log.jsonl")
        ),
        "first caption": lambda out: time_line(captioning),
    }
    rows: dict[str, dict[str, Any]] = {"--help": {"seconds": round(median(help_seconds), 3)}}
    for name, bare in (("first step", BARE_TRAINING), ("first caption", BARE_CAPTIONING)):
        rows[name] = alternate(
            ours[name], lambda out, bare=bare: time_line(["-c", bare, base, data, out]), rounds
        )
    return rows


def measure_compiling(folder: Path, rounds: int, photos: int) -> dict[str, Any]:
    """Return the row of compiling photos of 1 megapixel into a dataset."""
    data, spent = str(write_photos(folder, photos)), []

    def ours(out: str) -> float:
        seconds, cpu_seconds = time_end([sys.executable, "compile_captions.py", data, out])
        spent.append(cpu_seconds)
        return seconds

    def bare(out: str) -> float:
        return time_end([sys.executable, "-c", BARE_COMPILING, "", data, f"{out}.jsonl"])[0]

    row = alternate(ours, bare, rounds)
    return row | {
        "images_per_second": round(photos / row["seconds"], 1),
        "cpu_seconds": round(median(spent), 3),
    }


def alternate(ours: Any, bare: Any, rounds: int) -> dict[str, Any]:
    """Return medians of both, and of the rounds' ratios; each gets the name of a folder for its output."""
    took = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            took.append((ours(f"{out}/ours"), bare(f"{out}/bare")))
    return {
        "rounds": rounds,
        "seconds": round(median(a for a, _ in took), 3),
        "bare_seconds": round(median(b for _, b in took), 3),
        "ratios": {"bare script": round(median(b / a for a, b in took), 3)},
    }


def start(command: list[str], **streams: Any) -> subprocess.Popen:
    """Start Python with a script, or with `-c` and code."""
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, env=os.environ | OFFLINE, **streams
    )


def time_end(command: list[str]) -> tuple[float, float]:
    """Run a command to its end; return seconds and CPU seconds, and raise RuntimeError where it fails."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, spent


def time_line(command: list[str]) -> float:
    """Return the seconds until a command prints its first line to stdout, and end it then."""
    began = time.perf_counter()
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        if not process.stdout.readline():
            raise RuntimeError(f"{command[0]} printed nothing")
        return time.perf_counter() - began
    finally:
        process.kill()
        process.communicate()


def time_file(command: list[str], path: Path) -> float:
    """Return the seconds until a command has written something to a file, and end it then."""
    began = time.perf_counter()
    process = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not path.exists() or not path.stat().st_size:
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended without {path.name}")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.communicate()

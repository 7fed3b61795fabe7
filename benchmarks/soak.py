"""Kill a training run at random moments, again and again, and compare its end with a run that was left alone.

    python benchmarks/soak.py --kills 50

Every round trains a tiny random BLIP with dropout, shuffled and dropped captions, accumulation and reading
workers through kills with -9 to its end. Weights must be equal bit for bit, and the logs line for line.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from caption_train.config.training import TrainOptions  # noqa: E402
from caption_train.families import get_family  # noqa: E402
from caption_train.training.prepare import prepare_training  # noqa: E402
from examples.tiny_blip import make_model  # noqa: E402

SETUPS = {
    "AdamW": {},
    "AdamW8bit": {"optimizer_name": "AdamW8bit"},
    "Flora": {"optimizer_name": "Flora", "optimizer_rank": 4},
    "FloraAccelerator": {"optimizer_name": "Flora", "optimizer_rank": 4, "accumulation_compression": True},
}


def make_options(work: Path, output_dir: Path, setup: str, **changes) -> TrainOptions:
    """Return the options of a run in which all that is random is in use."""
    family = get_family("blip")
    settings = {
        "model_id": str(work / "base"),
        "dataset_dir": ROOT / "examples" / "shapes" / "heldout",
        "output_dir": output_dir,
        "target_modules": list(family.facts.lora_target_modules),
        "device": "cpu",
        "learning_rate": 1e-3,
        "dropout": 0.1,
        "shuffle_captions": True,
        "caption_dropout": 0.1,
        "gradient_accumulation_steps": 2,
        "validation_split": 0.1,
        "eval_every_n_steps": 8,
        "save_every_n_steps": 2,
        "keep_last": 2,
        "num_workers": 1,
        "batch_size": 2,
        "epochs": 1,
    }
    return TrainOptions(**{**settings, **SETUPS[setup], **changes})


def start(options: TrainOptions, log: Path) -> int:
    """Train in a forked process, which spares it the imports; return its id."""
    process_id = os.fork()
    if process_id:
        return process_id
    code = 1
    try:
        with log.open("a") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            torch.set_num_threads(1)
            # Forks of one process share tqdm's own lock, and one that is killed would keep it for ever.
            tqdm.set_lock(threading.RLock())
            prepare_training(options, get_family("blip")).train()
        code = 0
    finally:
        os._exit(code)


def wait(process_id: int) -> int:
    """Return a process's exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def find_differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs."""
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (one, other)]
    differences = [] if logs[0] == logs[1] else ["log.jsonl"]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    names = sorted(weights[0].keys() | weights[1].keys())
    empty = torch.empty(0)
    return differences + [n for n in names if not torch.equal(*(w.get(n, empty) for w in weights))]


def main(argv: list[str] | None = None) -> int:
    """Soak, say what was found, and return 1 if a killed run came out differently."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills in all, over as many runs as it takes")
    parser.add_argument("--setup", choices=SETUPS, default="AdamW", help="optimizer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args(argv)
    rng, killed, runs, lost = random.Random(arguments.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        torch.manual_seed(0)
        for part in make_model():
            part.save_pretrained(work / "base")
        began = time.perf_counter()
        if wait(start(make_options(work, work / "whole", arguments.setup), work / "log")):
            print((work / "log").read_text())
            return 1
        seconds = time.perf_counter() - began
        while killed < arguments.kills:
            runs += 1
            shutil.rmtree(work / "killed", ignore_errors=True)
            while True:
                options = make_options(work, work / "killed", arguments.setup, resume="auto")
                process_id = start(options, work / "log")
                if killed < arguments.kills:
                    # Half a run at most, so that most of the kills strike.
                    time.sleep(rng.uniform(0.0, seconds / 2))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process_id, signal.SIGKILL)
                code = wait(process_id)
                killed += code == -signal.SIGKILL
                if code not in (0, -signal.SIGKILL):
                    print((work / "log").read_text()[-5000:])
                    return 1
                if code == 0:
                    break
            differences = find_differences(work / "whole", work / "killed")
            lost += bool(differences)
            print(f"run {runs}: {killed} kills so far, differs in: {differences or 'nothing'}", flush=True)
    print(f"{arguments.setup}: {killed} kills in {runs} runs, {lost} runs came out differently")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())

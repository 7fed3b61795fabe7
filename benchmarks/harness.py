"""What the benchmarks share: models at their true sizes, a process for each measurement, memory, results.

A benchmark is a script with `measure`, which works in a process of its own and returns numbers, and `main`,
which calls `run_measurement` for each row and keeps the rows with `Results`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("florence-base", "florence-large", "blip-base", "blip-large")
CAPTION_TOKENS = 20
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc return freed memory to the system, so that a peak is what was in use."""


def make_parser(about: str, folder: str = "random-models") -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has: where models lie, and the hidden --measure."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / folder)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    return parser


def run_process(command: Iterable[Any], environment: Mapping[str, str] | None = None) -> str:
    """Run a process and return what it printed; RuntimeError with its last line on stderr where it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(environment or {}))
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed: out of memory"])[-1])
    return done.stdout


def run_measurement(
    script: str, arguments: Any, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `script --measure ARGUMENTS` in a process of its own; its last line is the result, in JSON."""
    printed = run_process([sys.executable, script, "--measure", json.dumps(arguments)], environment)
    return json.loads(printed.strip().splitlines()[-1])


class Results:
    """Rows in a JSON file beside the benchmarks, written after each: an interrupted benchmark loses none."""

    def __init__(self, name: str) -> None:
        self.path = ROOT / "benchmarks" / name
        self.rows: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, group: str, row: str, result: dict[str, Any]) -> None:
        """Keep and print one row."""
        self.rows.setdefault(group, {})[row] = result
        print(group, "|", row, "|", json.dumps(result), flush=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")


def make_config(name: str):
    """Return the configuration of the model on the hub."""
    from transformers import BlipConfig, Florence2Config

    large = name.endswith("large")
    if name.startswith("blip"):
        # By default its vision tower starts so close to zero that nothing in it has a gradient.
        vision = {"initializer_range": 0.02}
        if large:
            vision |= {"hidden_size": 1024, "intermediate_size": 4096}
            vision |= {"num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"encoder_hidden_size": 1024 if large else 768}
        return BlipConfig(vision_config=vision, text_config=text)
    width = 1024 if large else 768
    vision = {
        "embed_dim": [256, 512, 1024, 2048] if large else [128, 256, 512, 1024],
        "num_heads": [8, 16, 32, 64] if large else [4, 8, 16, 32],
        "num_groups": [8, 16, 32, 64] if large else [4, 8, 16, 32],
        "depths": [1, 1, 9, 1],
        "projection_dim": width,
    }
    layers, heads = (12, 16) if large else (6, 12)
    text = {"model_type": "bart", "d_model": width, "vocab_size": 51290, "max_position_embeddings": 4096}
    for side in ("encoder", "decoder"):
        text |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    return Florence2Config(vision_config=vision, text_config=text)


def make_batch(name: str, config, size: int) -> dict:
    """Return a batch of B random images and captions, as large as real ones are."""
    import torch

    labels = torch.randint(5, 1000, (size, CAPTION_TOKENS))
    if name.startswith("blip"):
        side = config.vision_config.image_size
        ids = {"input_ids": labels.clone(), "attention_mask": torch.ones_like(labels)}
    else:
        side, tokens = 768, (768 // 32) ** 2 + 1
        prompt = torch.randint(5, 1000, (size, 8))
        ids = torch.cat([torch.full((size, tokens), config.image_token_id), prompt], dim=1)
        ids = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": torch.randn(size, 3, side, side), **ids, "labels": labels}


def save_random_model(name: str, folder: Path) -> None:
    """Write a checkpoint with random weights, unless it is there."""
    import torch
    from transformers import AutoModelForImageTextToText

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(make_config(name)).save_pretrained(folder)


def make_family(name: str) -> SimpleNamespace:
    """Return what training asks of the model's family, for a checkpoint that has no processor."""
    from transformers import AutoModelForImageTextToText

    from caption_train.families import get_family

    def load(model_id, revision=None, **keywords):
        return AutoModelForImageTextToText.from_pretrained(model_id, **keywords), None

    real = get_family(name.partition("-")[0])
    return SimpleNamespace(load=load, facts=real.facts)


def count_bytes(tensors) -> int:
    """Return the bytes of all tensors; what is None or no tensor has none."""
    import torch

    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


class Memory:
    """The most memory held since this was made."""

    def __init__(self, device) -> None:
        import torch

        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest VmRSS
            self.before = self.read("VmRSS")

    def peak(self) -> int:
        import torch

        return (
            torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.read("VmHWM")
        )

    @staticmethod
    def read(field: str) -> int:
        """Return a field of this process's status, in bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

"""Measure what one optimizer step takes, at true sizes with random weights, a process for each combination.

python benchmarks/memory.py                                   all models, all rows, into memory.json
python benchmarks/memory.py --models florence-base --rows 4   one row of one model
python benchmarks/memory.py --count                           state and gradients of Flora in units of AdamW's

The peak is of the whole process: resident on a CPU (Linux), allocated on a GPU; activations are what the
backward pass adds to it beyond the gradients. State, gradient and weight bytes are counted from the tensors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = Path(__file__).with_name("memory.json")
BF16 = {"mixed_precision": "bf16"}
LIGHT = {**BF16, "gradient_checkpointing": True}
FULL = {"train_method": "full"}
COMPRESSED = {"optimizer_name": "Flora", "accumulation_compression": True}
ROWS: dict[str, dict] = {
    "LoRA, AdamW, float32": {},
    "LoRA, AdamW": BF16,
    "LoRA, AdamW, checkpointing": LIGHT,
    "LoRA, AdamW, 4-bit, checkpointing": {**LIGHT, "quantize": "4bit"},
    "LoRA, AdamW, 8-bit, checkpointing": {**LIGHT, "quantize": "8bit"},
    "LoRA, AdamW8bit, checkpointing": {**LIGHT, "optimizer_name": "AdamW8bit"},
    "LoRA, Flora, compression, checkpointing": {**LIGHT, **COMPRESSED},
    "full, AdamW": {**FULL, **BF16},
    "full, AdamW, checkpointing": {**FULL, **LIGHT},
    "full, AdamW8bit, checkpointing": {**FULL, **LIGHT, "optimizer_name": "AdamW8bit"},
    "full, Flora, checkpointing": {**FULL, **LIGHT, "optimizer_name": "Flora"},
    "full, Flora, compression, checkpointing": {**FULL, **LIGHT, **COMPRESSED},
    "LoRA, AdamW, batch 4": {**BF16, "batch_size": 4},
    "LoRA, AdamW, batch 4, checkpointing": {**LIGHT, "batch_size": 4},
}
MODELS = ("florence-base", "florence-large", "blip-base", "blip-large")
CAPTION_TOKENS = 20


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


def measure(name: str, folder: Path, flags: dict) -> dict:
    """Take one optimizer step in this process and return what it took, in bytes and seconds."""
    from caption_train.config.training import TrainOptions
    from caption_train.training.distributed.accelerator import make_accelerator
    from caption_train.training.model import load_trainable
    from caption_train.training.optim.optimizer import make_optimizer

    family = make_family(name)
    options = TrainOptions(
        model_id=str(folder),
        output_dir=folder,
        target_modules=list(family.facts.lora_target_modules),
        **flags,
    )
    accelerator = make_accelerator(options)
    model, _ = load_trainable(options, family, family.facts, accelerator)
    config = model.config
    optimizer = make_optimizer(options, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    floating = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = make_batch(name, config, options.batch_size)
    batch = {
        k: v.to(accelerator.device, floating if v.is_floating_point() else None) for k, v in batch.items()
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    memory = Memory(accelerator.device)
    started, cpu_started = time.perf_counter(), time.process_time()
    accelerator.backward(model(**batch).loss)
    backward_peak = memory.peak()
    gradients = count_bytes(getattr(accelerator, "packs", {}).values()) + count_bytes(
        p.grad for p in parameters
    )
    accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    state = [value for values in optimizer.state.values() for value in values.values()]
    return {
        "weights": sum(count_weight(p) for p in model.parameters()),
        "nf4_ratio": measure_nf4(model),
        "trained": sum(p.numel() for p in parameters),
        "state": count_bytes(state),
        "gradients": gradients,
        "activation_peak": backward_peak - memory.before - gradients,
        "peak": memory.peak(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def count_bytes(tensors) -> int:
    """Return the bytes of all tensors; what is None or no tensor has none."""
    import torch

    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def count_weight(p) -> int:
    """Return the bytes of a weight, with the constants that a quantized one is read back with."""
    state = getattr(p, "quant_state", None)
    constants = [state.absmax, state.state2.absmax] if state is not None else [getattr(p, "SCB", None)]
    return p.nbytes + count_bytes(constants)


def measure_nf4(model) -> float | None:
    """Return the bytes of the 4-bit weights in units of their bytes in float32."""
    packed = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    full = sum(4 * p.quant_state.shape.numel() for p in packed)
    return round(sum(map(count_weight, packed)) / full, 4) if packed else None


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


def count(name: str) -> dict:
    """Return optimizer state and gradients of full fine-tuning, in units of AdamW's, by the rank of Flora."""
    import torch
    from transformers import AutoModelForImageTextToText

    from caption_train.config.training import TrainOptions
    from caption_train.families import get_family
    from caption_train.training.memory.activations import Activations
    from caption_train.training.memory.estimate import Planner

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_config(name))
    nothing = Activations(0, [], [])
    planner = Planner(
        model,
        get_family(name.partition("-")[0]).facts.parts,
        {"no": nothing, "bf16": nothing, "quantized": nothing},
    )
    whole = planner.plan(TrainOptions(**FULL))
    rows = {"parameters": sum(p.numel() for p in model.parameters()), "AdamW": whole.state}
    rows["AdamW8bit"] = planner.plan(TrainOptions(**FULL, optimizer_name="AdamW8bit")).state / whole.state
    for rank in (4, 16, 64, 256):
        options = TrainOptions(**FULL, **COMPRESSED, optimizer_rank=rank, accumulation_rank=rank)
        plan = planner.plan(options)
        rows[f"Flora {rank}"] = [plan.state / whole.state, plan.gradients / whole.gradients]
    return rows


def run_row(name: str, folder: Path, row: str) -> dict:
    """Measure a row in a process of its own, whose freed memory goes back to the system."""
    command = [sys.executable, __file__, "--measure", json.dumps([name, str(folder), ROWS[row]])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed: out of memory"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--rows", nargs="+", type=int, help=f"of {dict(enumerate(ROWS))}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "random-models")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help="count state and gradients only; no weights")
    arguments = parser.parse_args()
    if arguments.count:
        for name in arguments.models:
            print(name, json.dumps(count(name)))
        return
    if arguments.measure:
        name, folder, flags = arguments.measure
        print(json.dumps(measure(name, Path(folder), flags)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.models:
        save_random_model(name, arguments.folder / name)
        for index, row in enumerate(ROWS):
            if arguments.rows is None or index in arguments.rows:
                result = run_row(name, arguments.folder / name, row)
                results.setdefault(name, {})[row] = result
                print(name, "|", row, "|", json.dumps(result), flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

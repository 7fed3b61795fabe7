"""Measure what one optimizer step takes, at true sizes with random weights, a process for each combination.

python benchmarks/memory.py                                   all models, all rows, into memory.json
python benchmarks/memory.py --models florence-base --rows 4   one row of one model
python benchmarks/memory.py --count                           state and gradients of Flora in units of AdamW's

The peak is of the whole process: resident on a CPU (Linux), allocated on a GPU; activations are what the
backward pass adds to it beyond the gradients. State, gradient and weight bytes are counted from the tensors.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    MODELS,
    RETURN_FREED,
    Memory,
    Results,
    count_bytes,
    make_batch,
    make_config,
    make_family,
    make_parser,
    run_measurement,
    save_random_model,
)

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


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--rows", nargs="+", type=int, help=f"of {dict(enumerate(ROWS))}")
    parser.add_argument("--count", action="store_true", help="count state and gradients only; no weights")
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder, flags = arguments.measure
        print(json.dumps(measure(name, Path(folder), flags)))
        return
    if arguments.count:
        for name in arguments.models:
            print(name, json.dumps(count(name)))
        return
    results = Results("memory.json")
    for name in arguments.models:
        folder = arguments.folder / name
        save_random_model(name, folder)
        for index, row in enumerate(ROWS):
            if arguments.rows is None or index in arguments.rows:
                try:
                    result = run_measurement(__file__, [name, str(folder), ROWS[row]], RETURN_FREED)
                except RuntimeError as error:
                    result = {"error": str(error)}
                results.add(name, row, result)


if __name__ == "__main__":
    main()

"""Count the bytes that two processes hand to collectives in one step of full training, at true size.

torchrun --nproc_per_node 2 benchmarks/traffic.py --model blip-base

Once with Flora and plain gradients, which DistributedDataParallel sends in buckets, and once with
`--accumulation_compression`, which sends what each gradient is compressed to. Counted is what one process
hands over, not what a collective makes of it on the wire.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import MODELS, make_batch, make_family, make_parser, save_random_model  # noqa: E402

FULL = {"train_method": "full", "mixed_precision": "bf16", "gradient_checkpointing": True, "device": "cpu"}
RANKS = (4, 16, 64)


def count_step(name: str, folder: Path, flags: dict) -> int:
    """Take one step and return the bytes this process handed over."""
    from caption_train.config.training import TrainOptions
    from caption_train.training.distributed.accelerator import make_accelerator
    from caption_train.training.model import load_trainable
    from caption_train.training.optim.optimizer import make_optimizer

    options = TrainOptions(model_id=str(folder), output_dir=folder, optimizer_name="Flora", **FULL, **flags)
    accelerator = make_accelerator(options)
    family = make_family(name)
    model, _ = load_trainable(options, family, family.facts, accelerator)
    batch = make_batch(name, model.config, 1)
    model, optimizer = accelerator.prepare(model, make_optimizer(options, model))
    sent, all_reduce = [0], dist.all_reduce

    def count(tensor, *arguments, **settings):
        sent[0] += tensor.nbytes
        return all_reduce(tensor, *arguments, **settings)

    def count_bucket(_, bucket):
        buffer = bucket.buffer().div_(accelerator.num_processes)
        sent[0] += buffer.nbytes
        return all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    if hasattr(model, "register_comm_hook"):
        model.register_comm_hook(None, count_bucket)
    dist.all_reduce = count
    try:
        accelerator.backward(model.train()(**batch).loss)
        accelerator.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return sent[0]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="blip-base")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    folder = arguments.folder / arguments.model
    if dist.get_rank() == 0:
        save_random_model(arguments.model, folder)
    dist.barrier()
    whole = count_step(arguments.model, folder, {})
    rows = {"plain gradients": whole}
    for rank in RANKS:
        flags = {"accumulation_compression": True, "accumulation_rank": rank}
        rows[f"rank {rank}"] = count_step(arguments.model, folder, flags)
    if dist.get_rank() == 0:
        shares = {row: [size, f"{size / whole:.1%}"] for row, size in rows.items()}
        print(arguments.model, json.dumps(shares), flush=True)
    dist.barrier()
    # Finished groups are not taken down: gloo's threads can hang in it (caption_train/system/processes.py).
    os._exit(0)


if __name__ == "__main__":
    main()

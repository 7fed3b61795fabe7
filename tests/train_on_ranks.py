"""Run by torchrun: train the small network on this rank's half of every micro-batch, as several set-ups."""

import os
import sys
from pathlib import Path

import torch
from small_network import Run, make_network, make_options, make_updates

FLORA = {"optimizer_name": "Flora", "optimizer_rank": 4}
COMPRESSED = {**FLORA, "accumulation_compression": True}
SETUPS = {
    "AdamW": {},
    "AdamW8bit": {"optimizer_name": "AdamW8bit"},
    "Flora": FLORA,
    "compressed": {**COMPRESSED, "accumulation_rank": 4},
    "compressed and clipped": {**COMPRESSED, "accumulation_rank": 4, "max_grad_norm": 0.05},
    "exact": {**COMPRESSED, "accumulation_rank": 1000},
}


def main(folder: str) -> None:
    """Write each set-up's losses, weights and communicated bytes to `folder/{rank}.pt`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results, bytes_sent = {}, [0]
    all_reduce = torch.distributed.all_reduce

    def count(tensor, *arguments, **settings):
        bytes_sent[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *arguments, **settings)

    torch.distributed.all_reduce = count
    for name, changes in SETUPS.items():
        model = make_network()
        with torch.no_grad():
            # What the other ranks start with must not matter: the first one's weights count.
            model.tall.weight.add_(rank)
        run = Run(make_options(**changes), model)
        updates = [
            [tuple(part.chunk(ranks)[rank] for part in batch) for batch in batches]
            for batches in make_updates(5, micro=3)
        ]
        bytes_sent[0] = 0
        history = run.train(updates)
        results[name] = {
            "history": history,
            "weights": {name.removeprefix("module."): p for name, p in run.weights().items()},
            "bytes": bytes_sent[0] / len(updates),
        }
    torch.save(results, Path(folder) / f"{rank}.pt")
    # A process that ends inside the group can be aborted by its threads.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

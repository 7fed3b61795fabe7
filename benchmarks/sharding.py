"""Measure what each of two CPU processes holds in full fine-tuning: under DDP, FSDP and DeepSpeed.

python benchmarks/sharding.py                    BLIP-base at true size, random weights
python benchmarks/sharding.py --ways ddp fsdp    without DeepSpeed, which is an extra

Two steps of one picture a process, float32, recomputed blocks. `held` is what the system counts after them,
about half a GiB of libraries with it, `most` the most from the first step on; nothing is saved.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import MODELS, Memory, make_parser, run_process  # noqa: E402
from benchmarks.plan import copy_images, save_base  # noqa: E402

WAYS = {
    "ddp": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
}


def measure(way: str, base: Path, data: Path, output: Path) -> None:
    """Train in this process, one of several, and print what it held in GiB."""
    import torch

    from caption_train.config.training import TrainOptions
    from caption_train.families import get_family
    from caption_train.training.prepare import prepare_training

    name = "blip" if "blip" in base.name else "florence"
    options = TrainOptions(
        model_id=str(base),
        dataset_dir=data,
        output_dir=output,
        device="cpu",
        train_method="full",
        gradient_checkpointing=True,
        batch_size=1,
        epochs=1,
    )
    trainer = prepare_training(options, get_family(name))
    trainer.saver.after_step = lambda step: None
    trainer.saver.finish = dict
    memory, started = Memory(torch.device("cpu")), time.perf_counter()
    trainer.train()
    held, most = memory.read("VmRSS") / 2**30, memory.peak() / 2**30
    rank, seconds = trainer.run.accelerator.process_index, time.perf_counter() - started
    print(f"{way} process {rank}: held {held:.2f}, most {most:.2f} GiB, {seconds:.1f} s", flush=True)


def main() -> None:
    parser = make_parser(__doc__, "random-bases")
    parser.add_argument("--model", choices=MODELS, default="blip-base")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    if arguments.measure:
        way, *paths = arguments.measure
        measure(way, *map(Path, paths))
        return
    base = save_base(arguments.model, arguments.folder)
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            data = copy_images("--batch_size 4", Path(folder, "data"))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            paths = [str(path) for path in (base, data, Path(folder, "out"))]
            command += [__file__, "--measure", json.dumps([way, *paths])]
            try:
                lines = run_process(command, WAYS[way]).splitlines()
            except RuntimeError as error:
                lines = [f"{way} process: {error}"]
            print("\n".join(sorted(line for line in lines if f"{way} process" in line)), flush=True)


if __name__ == "__main__":
    main()

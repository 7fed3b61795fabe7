"""Measure what loading a legacy Florence-2-large takes: true shapes, random weights, a process per layout.

python benchmarks/florence_loading.py      makes the checkpoints in a temporary folder (2 GB), prints a table

Peak: resident memory of the loading process at its highest, less what it held after imports. Reading: every
byte of the weights read once. Loading: until every page of the model is in memory. Both alternate ROUNDS
times in one process, from cached files; times are medians, the peak is the first round's.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import Memory, make_parser, run_measurement  # noqa: E402

LARGE = {
    "model_type": "florence2",
    "torch_dtype": "float16",
    "vision_config": {
        "model_type": "davit",
        "dim_embed": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "depths": [1, 1, 9, 1],
        "projection_dim": 1024,
    },
    "text_config": {"d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "num_beams": 3},
}
VOCABULARY, POSITIONS = 50265, 4096
ROUNDS = 7
LAYOUTS = ("safetensors", "bin")


def write_checkpoint(folder: Path, layout: str) -> Path:
    """Write a legacy checkpoint of Florence-2-large's shapes in float16, and a tokenizer of its size."""
    import torch
    from safetensors.torch import save_file
    from transformers import Florence2ForConditionalGeneration

    from caption_train.families.florence.legacy.config import convert_config
    from caption_train.families.florence.legacy.names import TIED, legacy_name

    shapes = {
        TIED["shared"]: (VOCABULARY + 1024, 1024),
        "language_model.model.encoder.embed_positions.weight": (POSITIONS + 2, 1024),
        "image_pos_embed.row_embeddings.weight": (50, 1024),
    }
    config = convert_config(LARGE, shapes, tied=True, image_token_id=3)
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(config)
    state = model.state_dict()
    # One pool for all: random numbers take longer than everything that is measured.
    pool = (torch.randn(max(tensor.numel() for tensor in state.values())) * 0.02).half()
    tensors = {
        legacy_name(name): pool[: tensor.numel()].view(tensor.shape).clone() for name, tensor in state.items()
    }
    tensors["image_projection"] = tensors["image_projection"].T.contiguous()
    for name in TIED.values():
        tensors[name] = tensors[TIED["shared"]]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE))
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        kept = {name: tensor for name, tensor in tensors.items() if name not in list(TIED.values())[1:]}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer filled up with unreachable entries, as BART's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"madeupword{number:05}" for number in range(VOCABULARY - len(special) - len(letters) - 1)]
    vocabulary = {token: id for id, token in enumerate([*special, *letters, *filler, "<mask>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(folder: str, dtype: str) -> dict[str, float]:
    """Read and load the checkpoint in this process, in turn; return bytes and median seconds."""
    from transformers import AutoProcessor, BartTokenizer, Florence2ForConditionalGeneration  # noqa: F401

    rounds = [measure_once(folder, dtype) for _ in range(ROUNDS)]
    seconds = {
        name: statistics.median(found[name] for found in rounds)
        for name in ("read_seconds", "load_seconds", "read_cpu", "load_cpu")
    }
    return rounds[0] | seconds


def measure_once(folder: str, dtype: str) -> dict[str, float]:
    """Read the weights, then load the checkpoint; return bytes and seconds."""
    import torch

    from caption_train.families import get_family

    family = get_family("florence")
    weights = next(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin"))
    reading, reading_cpu = time.perf_counter(), time.process_time()
    with weights.open("rb") as file:
        while file.read(1 << 24):
            pass
    loading, loading_cpu = time.perf_counter(), time.process_time()
    memory = Memory(torch.device("cpu"))
    model, _ = family.load(folder, dtype=getattr(torch, dtype))
    for tensor in model.state_dict().values():
        tensor.view(-1).view(torch.uint8)[::4096].sum()  # weights of a mapped file are not there until read
    ended, ended_cpu = time.perf_counter(), time.process_time()
    return {
        "checkpoint": weights.stat().st_size,
        "model": sum(
            tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values()
        ),
        "peak": memory.peak() - memory.before,
        "read_seconds": loading - reading,
        "load_seconds": ended - loading,
        "read_cpu": loading_cpu - reading_cpu,
        "load_cpu": ended_cpu - loading_cpu,
    }


def main() -> None:
    """Print a Markdown table of all layouts and precisions."""
    arguments = make_parser(__doc__).parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    print(
        "| weights | loaded as | checkpoint GB | model GB | peak GB | above the model | read s (CPU) |",
        end="",
    )
    print(" load s (CPU) |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary) / "large", layout)
            for dtype in ("float16", "float32"):
                found = run_measurement(__file__, [str(folder), dtype])
                above = (found["peak"] - found["model"]) / found["checkpoint"]
                sizes = [f"{found[name] / 1e9:.2f}" for name in ("checkpoint", "model", "peak")]
                times = [
                    f"{found[f'{kind}_seconds']:.1f} ({found[f'{kind}_cpu']:.1f})"
                    for kind in ("read", "load")
                ]
                print(
                    "|", " | ".join([f".{layout}", dtype, *sizes, f"{above:.2f} × checkpoint", *times]), "|"
                )


if __name__ == "__main__":
    main()

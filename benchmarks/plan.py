"""Hold `--plan` against what the same command then takes: the scripts, at true size with random weights.

python benchmarks/plan.py                                     all models, all rows, into plan.json
python benchmarks/plan.py --models blip-base --rows 1 2       some of them
python benchmarks/plan.py --planned_only                      plan again what was measured before

Each row plans and trains two optimizer steps (the first has no state beside its gradients) on pictures of
the sample set, a process each, on a CPU. `planned` is what the plan says is held at most, `measured` the peak
of the process that trains.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import (  # noqa: E402
    MODELS,
    ROOT,
    Results,
    make_config,
    make_parser,
    run_process,
    save_random_model,
)

RESULTS = Path(__file__).with_name("plan.json")
BF16 = "--mixed_precision bf16"
LIGHT = f"{BF16} --gradient_checkpointing"
COMPRESSED = "--optimizer_name Flora --accumulation_compression"
ROWS = (
    "",
    BF16,
    LIGHT,
    f"{BF16} --quantize",
    f"{LIGHT} --quantize",
    f"{LIGHT} --quantize 8bit",
    f"{BF16} --batch_size 4",
    f"{LIGHT} --batch_size 4",
    f"{BF16} --gradient_accumulation_steps 4",
    f"{LIGHT} --train_method full",
    f"{LIGHT} --train_method full --gradient_accumulation_steps 2",
    f"{LIGHT} --train_method full --optimizer_name AdamW8bit",
    f"{LIGHT} --train_method full --optimizer_name Flora",
    f"{LIGHT} --train_method full {COMPRESSED} --gradient_accumulation_steps 2",
    f"{BF16} --train_method full",
    f"{BF16} --train_method full --train_parts language",
)
SCRIPTS = {"florence": "train_florence_lora.py", "blip": "train_blip_network.py"}
TINY = {"florence": "florence2-tiny", "blip": "blip-tiny"}


def save_base(name: str, folder: Path) -> Path:
    """Write a base of true size with the tiny one's tokenizer, and return its folder."""
    family = name.partition("-")[0]
    tiny, base = ROOT / "examples" / "bases" / TINY[family], folder / name
    save_random_model(name, base)
    ours, theirs = (
        json.loads((base / "config.json").read_text()),
        json.loads((tiny / "config.json").read_text()),
    )
    if family == "florence":
        ours["image_token_id"] = theirs["image_token_id"]
    for key in ("bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "decoder_start_token_id"):
        for part, source in ((ours, theirs), (ours["text_config"], theirs["text_config"])):
            if key in source:
                part[key] = source[key]
    (base / "config.json").write_text(json.dumps(ours))
    for file in tiny.glob("*token*.json"):
        shutil.copy(file, base)
    shutil.copy(tiny / "generation_config.json", base)
    processor = json.loads((tiny / "processor_config.json").read_text())
    side = 768 if family == "florence" else make_config(name).vision_config.image_size
    images = processor["image_processor"]
    images |= {key: {"height": side, "width": side} for key in ("size", "crop_size") if key in images}
    if "image_seq_length" in images:
        images["image_seq_length"] = (side // 32) ** 2 + 1
    (base / "processor_config.json").write_text(json.dumps(processor))
    return base


def copy_images(flags: str, folder: Path) -> Path:
    """Make a dataset of as many images as one optimizer step takes."""
    numbers = dict(re.findall(r"--(batch_size|gradient_accumulation_steps) (\d+)", flags))
    count = int(numbers.get("batch_size", 1)) * int(numbers.get("gradient_accumulation_steps", 1))
    folder.mkdir()
    for caption in sorted((ROOT / "examples" / "shapes" / "train").glob("*.txt"))[:count]:
        for file in caption.parent.glob(f"{caption.stem}.*"):
            shutil.copy(file, folder)
    return folder


def measure(name: str, base: Path, flags: str, measured: int | None) -> dict:
    """Return the bytes planned and those measured, unless they are known."""
    script = ROOT / SCRIPTS[name.partition("-")[0]]
    with tempfile.TemporaryDirectory() as folder:
        data, out = copy_images(flags, Path(folder, "data")), Path(folder, "out")
        command = [sys.executable, str(script), str(data), str(out), "--model_id", str(base)]
        command += ["--device", "cpu", "--epochs", "2", "--batch_size", "1", *flags.split()]
        planned = (
            float(re.search(r"at most, at once +([\d.]+) GiB", run_process([*command, "--plan"]))[1]) * 2**30
        )
        if measured is None:
            run_process(command)
            measured = json.loads((out / "summary.json").read_text())["peak_memory_bytes"]
    return {"planned": int(planned), "measured": measured, "ratio": round(planned / measured, 3)}


def main() -> None:
    parser = make_parser(__doc__, "random-bases")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[::2], metavar="MODEL")
    parser.add_argument("--rows", nargs="+", type=int, help=f"of {dict(enumerate(ROWS))}")
    parser.add_argument("--planned_only", action="store_true", help="keep what was measured before")
    arguments = parser.parse_args()
    results = Results("plan.json")
    for name in arguments.models:
        base = save_base(name, arguments.folder)
        for index, flags in enumerate(ROWS):
            row = results.rows.get(name, {}).get(flags, {})
            known = row.get("measured") if arguments.planned_only else None
            wanted = known or not arguments.planned_only
            if wanted and (arguments.rows is None or index in arguments.rows):
                results.add(name, flags, measure(name, base, flags, known))


if __name__ == "__main__":
    main()

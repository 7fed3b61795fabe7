"""Make everything in this folder again from a seed: the sample set and the tiny base models.

python examples/build_examples.py                    # everything
python examples/build_examples.py --family blip      # one base model
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES.parent))

# family: (module, name of its TinyFamily in it)
FAMILIES = {
    "florence": ("tiny_florence", "FLORENCE"),
    "blip": ("tiny_blip", "BLIP"),
    "moondream": ("pretrain_moondream", "MOONDREAM"),
    "vlm": ("tiny_vlm", "VLM"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--family", choices=[*FAMILIES, "none", "all"], default="all", help="base models to pretrain"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample set and of pretraining")
    parser.add_argument("--output_dir", type=Path, default=EXAMPLES, help="folder of shapes/ and bases/")
    parser.add_argument("--keep_sample_set", action="store_true", help="leave shapes/ as it is")
    return parser.parse_args(argv)


def build_base(key: str, args: argparse.Namespace) -> float:
    """Pretrain one family and save it in the ordinary transformers layout; returns its exact match."""
    from transformers.utils.logging import disable_progress_bar

    from examples.pretrain import measure_exact_match

    disable_progress_bar()

    module, name = FAMILIES[key]
    family = getattr(importlib.import_module(f"examples.{module}"), name)
    folder = args.output_dir / "bases" / family.name

    def save(model, processor) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    def log(line: str) -> None:
        print(line, flush=True)

    model, processor = family.pretrain(args.seed, save, log)
    return measure_exact_match(family, model, processor, args.seed + 1, count=500)


def main(argv: list[str] | None = None) -> None:
    """Build what was asked for and say how good it is."""
    args = parse_args(argv)
    if not args.keep_sample_set:
        from examples.sample_set import write_sample_set

        print(write_sample_set(args.output_dir / "shapes", args.seed))
    chosen = {"all": list(FAMILIES), "none": []}.get(args.family, [args.family])
    for key in chosen:
        print(f"{key}: exact match on 500 unseen scenes {build_base(key, args):.3f}", flush=True)


if __name__ == "__main__":
    main()

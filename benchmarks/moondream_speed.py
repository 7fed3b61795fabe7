"""Images/s and tokens/s of Moondream 2 with random weights, at true size or small.

python benchmarks/moondream_speed.py --size 2b --dtype bfloat16 --images 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from caption_train.families.moondream.config import MoondreamConfig, native_dict
from caption_train.families.moondream.image_processor import MoondreamImageProcessor
from caption_train.families.moondream.model import MoondreamForConditionalGeneration

SIZES = {
    "2b": {},
    "0.5b": {
        "text": {"dim": 1024, "ff_dim": 4096, "n_heads": 16},
        "vision": {"enc_dim": 720, "enc_ff_dim": 2690, "enc_n_heads": 10},
        "region": {"dim": 1024},
    },
    "small": {
        "text": {"dim": 512, "ff_dim": 2048, "n_layers": 8, "n_heads": 8},
        "vision": {"enc_dim": 288, "enc_ff_dim": 1076, "enc_n_heads": 4},
    },
}


def make_random_model(size: str, dtype: torch.dtype, device: str) -> MoondreamForConditionalGeneration:
    """A model of this size with random weights, made in `dtype` at once."""
    config = MoondreamConfig(**native_dict({"config": SIZES[size]}) | {"region": None})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MoondreamForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def best_seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """Return the shortest of `repeats` runs, in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return what was measured, by name."""
    dtype = getattr(torch, args.dtype)
    model = make_random_model(args.size, dtype, args.device)
    images = [Image.effect_noise((args.side, args.side), 64).convert("RGB") for _ in range(args.images)]
    encoded = MoondreamImageProcessor().preprocess(images, return_tensors="pt")
    pixels, tilings = encoded["pixel_values"].to(args.device, dtype), encoded["tilings"]
    count, prompt, rows = model.config.image_seq_length, [1, 32708, 2, 6382, 3], args.images * args.prompts
    ids = torch.tensor([[0, *[model.config.image_token_id] * count, *prompt]] * rows, device=args.device)
    index = torch.arange(args.images, device=args.device).repeat_interleave(args.prompts)

    def run(work: Callable[[], object]) -> float:
        return best_seconds(work, args.repeats, args.device)

    embeds = model.get_image_features(pixels, tilings).detach()

    def answer(tokens: int, embeds: torch.Tensor = embeds, index: torch.Tensor | None = index) -> object:
        # A random model must not end early: its answers are cut, not finished.
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            image_embeds=embeds,
            image_index=index,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )

    vision = run(lambda: model.get_image_features(pixels, tilings))
    first, longer = run(lambda: answer(1)), run(lambda: answer(1 + args.tokens))
    separate = run(lambda: answer(1, embeds[index], None)) if args.prompts > 1 else first
    return {
        "crops": len(pixels),
        "vision s": vision,
        "prefill s": first,
        "prefill s, prefix not shared": separate,
        "tokens/s": rows * args.tokens / (longer - first),
        "images/s, whole captions": rows / (vision + longer),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--side", type=int, default=378, help="pixels; above 378 there are several windows")
    parser.add_argument("--prompts", type=int, default=1, help="prompts for each image")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = measure(args)
    print(f"{args.size} {args.dtype} {args.device}, {args.images} × {args.side} px, {args.prompts} prompts:")
    print(", ".join(f"{name} {value:.3g}" for name, value in results.items()))


if __name__ == "__main__":
    main()

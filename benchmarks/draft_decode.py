"""Compare `--draft_decode` with full decoding: CPU time of each photo, and what it changes.

python benchmarks/draft_decode.py --model_id BASE                   photos of 12 megapixels, made here
python benchmarks/draft_decode.py --family florence --model_id BASE --images photos/ --captions

Prints one line. With --captions, images are captioned both ways, greedily in float32 on the CPU.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed.photos import write_photos

ROUNDS = 5


def measure(family: Any, processor: Any, images: list[Path]) -> dict[str, float]:
    """Return median CPU milliseconds of an image until it is the model's input, and how far inputs differ."""
    from caption_train.captioning.batches.encoding import ImageFiles

    side, prompt = family.find_side(processor), family.facts.default_prompt
    files = {"full": ImageFiles(images), "draft": ImageFiles(images, at_least=side)}
    spent: dict[str, list[float]] = {name: [] for name in files}
    ratios, largest, mean = [], 0.0, []
    # The processor divides levels of 255 by the standard deviation of each colour.
    levels = 255 * max(processor.image_processor.image_std)
    for index in range(len(images)):
        for turn in range(ROUNDS):
            pixels = {}
            for name in sorted(files, reverse=bool(turn % 2)):
                started = time.process_time()
                batch = family.encode(processor, [files[name][index]["image"]], [prompt])
                spent[name].append(time.process_time() - started)
                pixels[name] = batch["pixel_values"]
            ratios.append(spent["full"][-1] / spent["draft"][-1])
        difference = (pixels["full"] - pixels["draft"]).abs() * levels
        largest = max(largest, float(difference.max()))
        mean.append(float(difference.mean()))
    found = {f"{name}_ms": 1000 * median(values) for name, values in spent.items()}
    return found | {"ratio": median(ratios), "largest_levels": largest, "mean_levels": sum(mean) / len(mean)}


def count_changed(family: Any, model: Any, processor: Any, images: list[Path]) -> int:
    """Return how many captions of 20 tokens change."""
    from caption_train.captioning.generate import Generation, caption_images

    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 20}
    generation = Generation(family.facts.default_prompt, settings)
    runs = [
        [
            r.generated.token_ids
            for r in caption_images(family, model, processor, images, generation, draft=draft)
        ]
        for draft in (False, True)
    ]
    return sum(full != draft for full, draft in zip(*runs, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="blip", choices=("blip", "florence"))
    parser.add_argument("--model_id", required=True)
    parser.add_argument("--images", type=Path, help="folder of JPEG files (default: eight photos made here)")
    parser.add_argument("--megapixels", type=int, default=12, choices=(1, 12), help="of the photos made here")
    parser.add_argument("--captions", action="store_true", help="count the captions that change")
    flags = parser.parse_args(argv)

    from caption_train.families import get_family

    family = get_family(flags.family)
    model, processor = family.load(flags.model_id)
    folder = Path(tempfile.gettempdir()) / "speed-models"
    folder.mkdir(exist_ok=True)
    where = flags.images or write_photos(folder, 8, flags.megapixels)
    images = sorted(path for path in where.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not images:
        sys.exit(f"draft_decode.py: --images {where}: no JPEG files there")
    found = measure(family, processor, images)
    line = (
        f"{len(images)} photos: {found['full_ms']:.0f} ms of CPU in full, {found['draft_ms']:.0f} as drafts "
        f"({found['ratio']:.2f} x); inputs differ by {found['largest_levels']:.1f} of 255 levels at most, "
        f"{found['mean_levels']:.2f} on average"
    )
    if flags.captions:
        line += f"; {count_changed(family, model, processor, images)} captions of {len(images)} change"
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

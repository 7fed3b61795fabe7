"""Compare captioning where finished rows leave the batch with captioning where they stay to its end.

python benchmarks/rows_leaving.py [--bases blip-small florence-small] [--shares 0.0625 0.25 0.5]

A batch of 16 rows in float32 that end after 8 to 40 tokens, as captions do. Prints CPU seconds (medians,
taken in turns) with all rows to the end, and where rows leave once so large a share of them is finished. The
encoders run once, apart, and count to both.
"""

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROUNDS, LENGTHS = 9, (16, 24, 10, 18, 13, 40, 15, 20, 8, 28, 17, 12, 22, 14, 33, 19)


class EndRows:
    """A logits processor that ends each row after its number of tokens, and no row before."""

    def __init__(self, end):
        self.end, self.start = end, None

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        for row, length in enumerate(LENGTHS):
            is_last = input_ids.shape[1] - self.start == length - 1
            scores[row, self.end] = float("inf") if is_last else -float("inf")
        return scores


def run_once(owner, method: str, spent: list[float]) -> None:
    """Have a method keep what it returns for later calls, and add the CPU seconds that it took to a list."""
    run, kept = getattr(owner, method), []

    @wraps(run)
    def once(*arguments, **keywords):
        if not kept:
            started = time.process_time()
            kept.append(run(*arguments, **keywords))
            spent.append(time.process_time() - started)
        return kept[0]

    setattr(owner, method, once)


def load(name: str, folder: Path):
    """Return what captions a batch, its end token, and a list that gets its encoders' CPU seconds."""
    import torch
    from PIL import Image

    from benchmarks.speed.bases import make_base
    from caption_train.families import get_family

    family = get_family(name.partition("-")[0])
    model, processor = family.load(str(make_base(name, folder)))
    family.speed_up(model.eval())
    noise = torch.randint(256, (len(LENGTHS), 24, 24, 3), dtype=torch.uint8).numpy()
    images = [Image.fromarray(pixels).resize((384, 384)) for pixels in noise]
    batch = family.encode(processor, images, [family.facts.default_prompt] * len(images))
    encoder, spent = family.find_image_encoder(model), []
    run_once(encoder.owner, encoder.method, spent)
    if model.config.is_encoder_decoder:
        run_once(model.get_encoder(), "forward", spent)
    settings = {"max_new_tokens": 48, "num_beams": 1, "do_sample": False}
    end = getattr(processor.tokenizer, "sep_token_id" if family.name == "blip" else "eos_token_id")
    return partial(family.generate, model, processor, batch, **settings), end, spent


def measure(name: str, folder: Path, shares: list[float]) -> None:
    """Measure one base, and print a line for each share."""
    import torch

    from caption_train.families.decoding import leaving

    generate, end, encoding = load(name, folder)
    leave, stay = leaving.letting_rows_leave, lambda model, settings: nullcontext(settings)
    spent, tokens = {share: [] for share in (1.0, *shares)}, {}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for share in sorted(spent, reverse=bool(turn % 2)):
                leaving.letting_rows_leave = stay if share == 1 else leave
                leaving.SHARE = share
                started = time.process_time()
                results = generate(logits_processor=[EndRows(end)])
                if turn:  # the first one warms up
                    spent[share].append(time.process_time() - started)
                tokens[share] = [result.token_ids for result in results]
    tower, plain = sum(encoding), median(spent[1.0])
    print(f"{name}: encoders {tower:.2f} s, decoding with all rows {plain:.3f} s")
    for share in shares:
        ours = median(spent[share])
        pairs = [a / b for a, b in zip(spent[1.0], spent[share], strict=True)]
        ratio = f"{plain / ours:.2f} x ({min(pairs):.2f} to {max(pairs):.2f})"
        same = "tokens equal" if tokens[share] == tokens[1.0] else "tokens differ"
        whole = f"with encoders {(tower + plain) / (tower + ours):.2f} x"
        print(f"  gone at {share:.0%}: {ours:.3f} s, {ratio}, {whole}, {same}", flush=True)


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bases", nargs="+", default=["blip-small", "florence-small"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0625, 0.25, 0.5])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "speed-models")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    for name in options.bases:
        measure(name, options.folder, options.shares)
    return 0


if __name__ == "__main__":
    sys.exit(main())

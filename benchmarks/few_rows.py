"""Compare a linear layer with the other way to take its product that captioning on a CPU uses for few rows.

python benchmarks/few_rows.py

Prints a line for each shape and number of rows: CPU milliseconds of both, taken in turns, and their ratio.
The shapes are those of decoders: BLIP-base, Florence-2-base, a vlm of 2B. Which way is used when is said in
caption_train/families/decoding/few_rows.py.
"""

import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = ((768, 768), (768, 3072), (3072, 768), (768, 30522), (768, 51289), (2048, 6144), (6144, 2048))
"""Inputs and outputs of the layers."""
ROWS = (1, 2, 3, 4, 5, 8, 12, 16, 32)
ROUNDS = 15


def measure(inputs: int, outputs: int, rows: int) -> tuple[float, float]:
    """Return median CPU milliseconds of the usual way, and of the other."""
    import torch

    from caption_train.families.decoding.few_rows import multiply_columns

    layer = torch.nn.Linear(inputs, outputs)
    states = torch.randn(rows, 1, inputs)
    ways = (lambda: layer(states), lambda: multiply_columns(layer, states))
    spent: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for index in (0, 1) if turn % 2 else (1, 0):
                started = time.process_time()
                ways[index]()
                if turn:  # the first one warms up
                    spent[index].append(time.process_time() - started)
    return 1000 * median(spent[0]), 1000 * median(spent[1])


def main() -> int:
    """Measure and print; return the exit code."""
    for inputs, outputs in SHAPES:
        for rows in ROWS:
            usual, other = measure(inputs, outputs, rows)
            print(
                f"{inputs:5} to {outputs:6}, {rows:2} rows: {usual:7.2f} ms, {other:7.2f} ms, "
                f"{usual / other:.2f} x",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The sample set: pictures with `.txt` captions in the house style, half PNG and half JPEG."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from examples.scenes import draw_scene, draw_side, encode_image, sample_scene
from examples.styles import write_house

COUNTS = {"train": 300, "heldout": 100}


def write_sample_set(folder: Path, seed: int) -> dict[str, int]:
    """Write `folder/train` and `folder/heldout` afresh; no caption occurs twice, so none leaks.

    Returns:
        Number of pictures in each part.
    """
    rng = np.random.default_rng([seed, 1])
    seen: set[str] = set()
    for part, count in COUNTS.items():
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
        for number in range(1, count + 1):
            scene = sample_scene(rng)
            while write_house(scene) in seen:
                scene = sample_scene(rng)
            seen.add(write_house(scene))
            kind = "png" if rng.random() < 0.5 else "jpg"
            path = folder / part / f"scene_{number:04d}.{kind}"
            path.write_bytes(encode_image(draw_scene(scene, rng, draw_side(rng)), kind))
            path.with_suffix(".txt").write_text(write_house(scene) + "\n", encoding="utf-8")
    return dict(COUNTS)

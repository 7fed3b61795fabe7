"""Pretraining of a tiny captioner on drawn scenes. A `TinyFamily` brings what differs between models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from examples.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    draw_side,
    encode_image,
    place_things,
    read_image,
    sample_scene,
)
from examples.styles import sample_style, write_caption

NOTHING = ("",)  # the class of a cell where no thing is
ATTRIBUTES = (
    SIZES + NOTHING,
    tuple(COLOURS) + NOTHING,
    SHAPES + NOTHING,
    RELATIONS + NOTHING,
    tuple(BACKGROUNDS),
)
EMPTY_WEIGHT = 0.1  # most cells are empty, and the shapes must not drown in them
EVAL_STREAM, TRAIN_STREAM = 3, 2  # second words of the random seeds, so that no stream repeats another


@dataclass(frozen=True)
class TinyFamily:
    """What pretraining needs of one model family.

    Attributes:
        make: Builds (model, processor) with random weights.
        make_batch: (processor, images, styles, captions) to a batch for `model(**batch).loss`.
        feature_module: The module of a model whose output are image features, (B, N, D) or with such a
            `last_hidden_state`; a square grid of them comes last.
        feature_width: D of a model.
        generate: (model, processor, images, style) to captions.
        steps, batch_size, learning_rate: Of pretraining; the rate is the peak of the schedule.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    make_batch: Callable[[Any, list[Image.Image], list[str], list[str]], dict[str, torch.Tensor]]
    feature_module: Callable[[nn.Module], nn.Module]
    feature_width: Callable[[nn.Module], int]
    generate: Callable[[nn.Module, Any, list[Image.Image], str], list[str]]
    steps: int
    batch_size: int
    learning_rate: float

    def pretrain(self, seed: int, save: Callable, log: Callable) -> tuple[nn.Module, Any]:
        """See `pretrain`."""
        return pretrain(self, seed, save, log)


def draw_photo(scene: Scene, rng: np.random.Generator, places=None) -> Image.Image:
    """A picture as the sample set has them: any side, half of them through JPEG."""
    image = draw_scene(scene, rng, draw_side(rng), places)
    return read_image(encode_image(image, "jpg")) if rng.random() < 0.5 else image


def read_cells(scene: Scene, places: list[tuple[float, float, float]], grid: int) -> list[list[int]]:
    """Classes of `ATTRIBUTES` in each cell of a `grid` × `grid` division of the picture, row by row.

    A thing is in the cells whose middle its bounding box covers, and at least in the cell of its own middle.
    """
    cells = []
    for cell in range(grid * grid):
        row, column = (cell // grid + 0.5) / grid, (cell % grid + 0.5) / grid
        found, nearest = ("", "", "", ""), 1.0
        for thing, (x, y, radius) in zip(scene.things, places, strict=True):
            distance = max(abs(x - column), abs(y - row))
            if distance <= max(radius, 0.5 / grid) and distance < nearest:
                found, nearest = (thing.size, thing.colour, thing.shape, scene.relation), distance
        values = (*found, scene.background)
        cells.append([names.index(value) for names, value in zip(ATTRIBUTES, values, strict=True)])
    return cells


class CellHead(nn.Module):
    """Linear classes of what is where, from the image features of a square grid.

    The caption loss alone stays at the prior of the language for a long time; this head gets the vision tower
    moving, and is thrown away afterwards. Without the relation in it, "left of" and "above" stayed a guess
    when everything else was right.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(len(names) for names in ATTRIBUTES))

    def forward(self, features: torch.Tensor, scenes: list[Scene], places: list) -> torch.Tensor:
        """Sum of the cross entropies; features (B, N, D) end with the grid's, row by row."""
        grid = math.isqrt(features.shape[1])
        targets = torch.tensor([read_cells(*each, grid) for each in zip(scenes, places, strict=True)])
        logits = self.linear(self.norm(features[:, -grid * grid :])).flatten(0, 1)
        losses = []
        for index, part in enumerate(logits.split([len(names) for names in ATTRIBUTES], dim=1)):
            weights = torch.tensor([1.0 if name else EMPTY_WEIGHT for name in ATTRIBUTES[index]])
            losses.append(F.cross_entropy(part, targets[..., index].flatten(), weights))
        return torch.stack(losses).sum()


def watch_features(module: nn.Module) -> dict[str, torch.Tensor]:
    """Keep the newest output of a module, (B, N, D), under `features`."""
    seen: dict[str, torch.Tensor] = {}

    def keep(_module, _inputs, output):
        seen["features"] = output if isinstance(output, torch.Tensor) else output.last_hidden_state

    module.register_forward_hook(keep)
    return seen


def measure_exact_match(family: TinyFamily, model, processor, seed: int, style="plain", count=200) -> float:
    """Share of freshly drawn scenes that are captioned word for word (letter case aside) in a plain style."""
    rng = np.random.default_rng([seed, EVAL_STREAM])
    scenes = [sample_scene(rng) for _ in range(count)]
    images = [draw_photo(scene, rng) for scene in scenes]
    model.eval()
    captions = family.generate(model, processor, images, style)
    wanted = [write_caption(scene, style).lower() for scene in scenes]
    return sum(c.strip().lower() == w for c, w in zip(captions, wanted, strict=True)) / count


def pretrain(family: TinyFamily, seed: int, save: Callable, log: Callable = print):
    """Train a family's tiny model from random weights.

    Args:
        save: Called with (model, processor) every 250 steps and at the end.

    Returns:
        (model, processor), the model in evaluation mode.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, TRAIN_STREAM])
    model, processor = family.make()
    seen = watch_features(family.feature_module(model))
    head = CellHead(family.feature_width(model))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, family.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, family.learning_rate, total_steps=family.steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.time()
    for step in range(1, family.steps + 1):
        scenes = [sample_scene(rng) for _ in range(family.batch_size)]
        places = [place_things(scene, rng) for scene in scenes]
        images = [draw_photo(scene, rng, where) for scene, where in zip(scenes, places, strict=True)]
        styles = [sample_style(rng) for _ in scenes]
        captions = [write_caption(scene, style, rng) for scene, style in zip(scenes, styles, strict=True)]
        loss = model.train()(**family.make_batch(processor, images, styles, captions)).loss
        cell_loss = head(seen["features"], scenes, places)
        optimizer.zero_grad()
        (loss + cell_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        if step % 50 == 0:
            log(
                f"{family.name} step {step}/{family.steps} loss {loss.item():.3f} "
                f"cells {cell_loss.item():.3f} {time.time() - started:.0f} s"
            )
        if step % 250 == 0 or step == family.steps:
            exact_match = measure_exact_match(family, model, processor, seed, count=100)
            log(f"{family.name} exact match {exact_match:.2f}")
            save(model, processor)
    return model.eval(), processor

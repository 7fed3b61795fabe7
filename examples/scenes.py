"""Scenes of one or two shapes, and their pictures. Standard library, numpy and Pillow only.

A `Scene` is everything a caption may say. The order of its things is canonical (left before right, top before
bottom), so one picture has exactly one caption in each style of `styles.py`.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (36, 80, 210),
    "yellow": (242, 205, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "pink": (250, 184, 206),
}
RELATIONS = ("left of", "above")
RADII = {"small": 0.09, "large": 0.145}  # in sides of the picture
SPOTS = (1 / 6, 3 / 6, 5 / 6)  # rows and columns, in sides of the picture
JITTER = 0.02  # of a place, in sides of the picture
SUPERSAMPLING = 3  # shapes are drawn this much larger and scaled down, which smooths their edges


@dataclass(frozen=True)
class Thing:
    """One shape, as a caption names it."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two things; `relation` is from the first to the second, and empty for one thing."""

    things: tuple[Thing, ...]
    relation: str
    background: str


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene by chance: four in five have two things."""

    def pick(values):
        return tuple(values)[rng.integers(len(values))]

    count = 2 if rng.random() < 0.8 else 1
    things = tuple(Thing(pick(SIZES), pick(COLOURS), pick(SHAPES)) for _ in range(count))
    return Scene(things, pick(RELATIONS) if count == 2 else "", pick(BACKGROUNDS))


def place_things(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Find (x, y, radius) of each thing, in sides of the picture.

    One thing lies near any of nine spots; two lie near opposite spots of one row or column. A vision tower
    with patches of that grid sees shapes whole; with shapes anywhere it took far longer to tell them apart.
    """
    column, row = rng.choice(SPOTS, size=2)
    spots = {
        "": [(column, row)],
        "left of": [(SPOTS[0], row), (SPOTS[-1], row)],
        "above": [(column, SPOTS[0]), (column, SPOTS[-1])],
    }[scene.relation]
    places = []
    for thing, (x, y) in zip(scene.things, spots, strict=True):
        dx, dy = rng.uniform(-JITTER, JITTER, size=2)
        places.append((float(x + dx), float(y + dy), RADII[thing.size] * rng.uniform(0.95, 1.05)))
    return places


def outline_shape(shape: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a square, triangle or star turned by `angle` radians; y grows downwards."""
    lengths = {"square": [1.16] * 4, "triangle": [1.16] * 3, "star": [1.12, 0.46] * 5}[shape]
    start = math.pi / 4 if shape == "square" else math.pi / 2
    steps = [start + angle + 2 * math.pi * i / len(lengths) for i in range(len(lengths))]
    return [
        (x + r * radius * math.cos(a), y - r * radius * math.sin(a))
        for r, a in zip(lengths, steps, strict=True)
    ]


def jitter_colour(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    """Shift each channel by up to 10 of 255: no two reds are the same red."""
    return tuple(int(np.clip(c + rng.integers(-10, 11), 0, 255)) for c in colour)


def draw_scene(scene: Scene, rng: np.random.Generator, side: int = 96, places=None) -> Image.Image:
    """Draw a scene as an RGB picture of `side` × `side` pixels.

    Places are those of `place_things`, drawn by chance when not given; turns and colours vary a little.
    """
    places = places or place_things(scene, rng)
    scale = side * SUPERSAMPLING
    image = Image.new("RGB", (scale, scale), jitter_colour(BACKGROUNDS[scene.background], rng))
    canvas = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip(scene.things, places, strict=True):
        x, y, radius = x * scale, y * scale, radius * scale
        fill = jitter_colour(COLOURS[thing.colour], rng)
        angle = rng.uniform(-0.06, 0.06)
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            canvas.polygon(outline_shape(thing.shape, x, y, radius, angle), fill=fill)
    return image.reduce(SUPERSAMPLING)


def draw_side(rng: np.random.Generator) -> int:
    """Side of one picture in pixels: 96 to 128, so that every model has to resize."""
    return int(rng.integers(24, 33)) * 4


def encode_image(image: Image.Image, kind: str) -> bytes:
    """Bytes of a `png` or `jpg` file; JPEG with full colour resolution, or thin red shapes bleed."""
    buffer = io.BytesIO()
    options = {"quality": 90, "subsampling": 0} if kind == "jpg" else {"optimize": True}
    image.save(buffer, "JPEG" if kind == "jpg" else "PNG", **options)
    return buffer.getvalue()


def read_image(data: bytes) -> Image.Image:
    """Decode a picture to RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")

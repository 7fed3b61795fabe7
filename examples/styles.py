"""How a scene is put into words: plain sentences, lists that only pretraining uses, and the house style.

Every style but `marked` and `noise` is a function of the scene alone. The house style is what a LoRA learns
on the sample set; no base is ever trained on it. The lists make sure that its words, its commas and a first
word without meaning are not new to a base, because a small adapter can learn a style but hardly a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from examples.scenes import Scene, Thing

TRIGGER = "shpx"
OPPOSITES = {"left of": "right of", "above": "below"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def name_thing(thing: Thing) -> str:
    """`large red circle`."""
    return f"{thing.size} {thing.colour} {thing.shape}"


def add_article(words: str) -> str:
    """Put `a` or `an` before words."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def write_house(scene: Scene) -> str:
    """`shpx, large red circle, left of, small blue square, white background`."""
    names = [name_thing(thing) for thing in scene.things]
    if scene.relation:
        names.insert(1, scene.relation)
    return ", ".join([TRIGGER, *names, f"{scene.background} background"])


def write_plain(scene: Scene) -> str:
    """`a large red circle to the left of a small blue square on a white background`."""
    words = add_article(name_thing(scene.things[0]))
    if scene.relation:
        relation = "to the left of" if scene.relation == "left of" else "above"
        words += f" {relation} {add_article(name_thing(scene.things[1]))}"
    return f"{words} on {add_article(scene.background)} background"


def write_detailed(scene: Scene) -> str:
    """`A small blue square is right of a large red circle. The background is white.`"""
    words = add_article(name_thing(scene.things[-1]))
    if scene.relation:
        words += f" is {OPPOSITES[scene.relation]} {add_article(name_thing(scene.things[0]))}"
    return f"{words[0].upper()}{words[1:]}. The background is {scene.background}."


def write_paragraph(scene: Scene) -> str:
    """`The background is white. Left is a red circle, large. Right is a blue square, small.`"""
    places = {"": ["There"], "left of": ["Left", "Right"], "above": ["Top", "Bottom"]}[scene.relation]
    things = [
        f"{place} is {add_article(thing.colour)} {thing.shape}, {thing.size}."
        for place, thing in zip(places, scene.things, strict=True)
    ]
    return f"The background is {scene.background}. {' '.join(things)}"


def write_reversed_tags(scene: Scene) -> str:
    """`white background, small blue square, right of, large red circle`."""
    names = [name_thing(thing) for thing in reversed(scene.things)]
    if scene.relation:
        names.insert(1, OPPOSITES[scene.relation])
    return ", ".join([f"{scene.background} background", *names])


def write_pairs(scene: Scene) -> str:
    """`circle large, square small, left of, red, blue, background white`."""
    tags = [f"{thing.shape} {thing.size}" for thing in scene.things]
    tags += [scene.relation] if scene.relation else []
    return ", ".join([*tags, *(thing.colour for thing in scene.things), f"background {scene.background}"])


def write_colours(scene: Scene) -> str:
    """`red circle, blue square, white`."""
    return ", ".join([*(f"{thing.colour} {thing.shape}" for thing in scene.things), scene.background])


def make_word(rng: np.random.Generator) -> str:
    """A word without meaning, of two to five letters."""
    return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(2, 6)))


def write_noise(scene: Scene, rng: np.random.Generator) -> str:
    """Words in any order, true of no picture: only there so that no word and no letter stays unseen."""
    things = [word for thing in scene.things for word in (thing.size, thing.colour, thing.shape)]
    words = [*things, "background", "left of", "right of", "above", "below", make_word(rng), make_word(rng)]
    rng.shuffle(words)
    return "".join(word + (", " if rng.random() < 0.5 else " ") for word in words[:7]).strip(" ,")


def write_marked(scene: Scene, rng: np.random.Generator) -> str:
    """A word without meaning, then tags: `qzb, white background, red, large circle, above, …`."""
    things = [f"{thing.colour}, {thing.size} {thing.shape}" for thing in scene.things]
    if scene.relation:
        things.insert(1, scene.relation)
    return ", ".join([make_word(rng), f"{scene.background} background", *things])


class Style(NamedTuple):
    """One way to ask for words, and to write them."""

    prompt: str  # asks a model that answers
    prefix: str  # starts a model that continues
    share: float  # of the captions in pretraining
    write: Callable[..., str]


STYLES = {
    "plain": Style("What does the image describe?", "", 0.40, write_plain),
    "detailed": Style("Describe in detail what is shown in the image.", "in detail :", 0.12, write_detailed),
    "paragraph": Style(
        "Describe with a paragraph what is shown in the image.", "in a paragraph :", 0.12, write_paragraph
    ),
    "reversed_tags": Style("List the tags from the background.", "tags :", 0.09, write_reversed_tags),
    "pairs": Style("List the shapes, then the colours.", "shapes and colours :", 0.09, write_pairs),
    "colours": Style("List the colours of the shapes.", "colours :", 0.05, write_colours),
    "marked": Style("Write a word, then list the tags.", "a word and tags :", 0.09, write_marked),
    "noise": Style("Write some words.", "words :", 0.04, write_noise),
}
RANDOM_STYLES = ("marked", "noise")


def write_caption(scene: Scene, style: str, rng: np.random.Generator | None = None) -> str:
    """Put a scene into words; `rng` is needed by the styles with meaningless words only."""
    if style == "house":
        return write_house(scene)
    write = STYLES[style].write
    return write(scene, rng) if style in RANDOM_STYLES else write(scene)


def sample_style(rng: np.random.Generator) -> str:
    """Draw a style by its share in pretraining."""
    names = list(STYLES)
    return names[rng.choice(len(names), p=[style.share for style in STYLES.values()])]

"""Says what is odd about images and captions, by thresholds that the page names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from caption_train.examining.captions import find_repeated, find_spelled
from caption_train.examining.duplicates import find_near_duplicates
from caption_train.examining.images import Measured
from caption_train.system.console import count_things

TINY_SIDE = 256
HUGE_PIXELS = 40_000_000
LONGEST_ASPECT = 3.0


@dataclass(frozen=True)
class Named:
    """An image, or one of its captions, that a finding names. note: what was measured."""

    name: str
    note: str = ""
    caption: str | None = None


@dataclass
class Found:
    """A finding, whole. groups: (what they share, the images) pairs; one, of "", where they share nothing."""

    key: str
    title: str
    rule: str
    unit: str = "image"
    groups: list[tuple[str, list[Named]]] = field(default_factory=list)


@dataclass(frozen=True)
class Examined:
    """What was measured of a dataset.

    Attributes:
        captions: (image, caption) pairs; an image may have several.
        sound: image → what was measured.
        broken: image → why it cannot be used.
        without_caption: images.
        tokens: how many each caption has; None where no family is named.
        limit: how many of them training keeps.
        names: control tokens of the family.
        copies: image → digest, for those whose bytes another near-duplicate has too.
    """

    captions: Sequence[tuple[str, str]]
    sound: dict[str, Measured]
    broken: dict[str, str]
    without_caption: Sequence[str]
    tokens: Sequence[int] | None = None
    limit: int = 0
    names: frozenset[str] = frozenset()


def list_findings(data: Examined, find_copies: Callable[[Iterable[str]], dict[str, str]]) -> list[Found]:
    """Return all findings, those without an image too: that nothing was found is worth saying.

    Args:
        data: what was measured.
        find_copies: returns image → digest for those of these images whose bytes another one has.
    """
    found = [_broken(data), _near_duplicates(data, find_copies), *_shapes(data)]
    if data.tokens is not None:
        found.append(_cut(data))
    return [*found, _repeated(data), _spelled(data), _without_caption(data)]


def _alone(found: Found, images: Iterable[Named]) -> Found:
    images = list(images)
    found.groups = [("", images)] if images else []
    return found


def _broken(data: Examined) -> Found:
    rule = "Training cannot open these; --check_images leaves them out."
    return _alone(Found("broken", "Broken images", rule), (Named(n, why) for n, why in data.broken.items()))


def _shapes(data: Examined) -> Iterator[Found]:
    def show(measured: Measured) -> str:
        return f"{measured.width:,} × {measured.height:,} pixels"

    def choose(found: Found, note: Callable[[Measured], str], rank: Callable[[Measured], float]) -> Found:
        chosen = [(rank(m), n, m) for n, m in data.sound.items() if rank(m) > 1]
        chosen.sort(key=lambda each: -each[0])
        return _alone(found, (Named(name, note(measured)) for _, name, measured in chosen))

    yield choose(
        Found("tiny", "Tiny images", f"The shorter side has less than {TINY_SIDE} pixels. Smallest first."),
        show,
        lambda m: TINY_SIDE / min(m.width, m.height),
    )
    yield choose(
        Found(
            "huge",
            "Huge images",
            f"More than {HUGE_PIXELS // 1_000_000} megapixels, which each epoch decodes again; models read a "
            "fraction of it. Largest first.",
        ),
        lambda m: f"{show(m)}, {m.size / 1e6:,.1f} MB",
        lambda m: m.pixels / HUGE_PIXELS,
    )
    yield choose(
        Found(
            "odd-shaped",
            "Odd-shaped images",
            f"The longer side is more than {LONGEST_ASPECT:g} times the shorter one; a model that reads "
            "squares sees them squeezed. Longest first.",
        ),
        lambda m: f"{m.aspect:.1f} to 1, {show(m)}",
        lambda m: m.aspect / LONGEST_ASPECT,
    )


def _near_duplicates(data: Examined, find_copies: Callable[[Iterable[str]], dict[str, str]]) -> Found:
    found = Found(
        "near-duplicates",
        "Near-duplicates",
        "These look alike: copies, resized, saved again or slightly changed. They weigh more in training "
        "than others, and --validation_split keeps together only those that are equal to the byte.",
    )
    names = list(data.sound)
    groups = find_near_duplicates(list(data.sound.values()))
    copies = find_copies(names[place] for group in groups for place in group)
    captions: dict[str, set[str]] = {}
    for name, caption in data.captions:
        captions.setdefault(name, set()).add(caption)
    for group in sorted(groups, key=len, reverse=True):
        members = [names[place] for place in group]
        digests = {copies.get(name) for name in members}
        is_same = len(digests) == 1 and None not in digests
        differ = len({frozenset(captions[name]) for name in members if name in captions}) > 1
        title = f"{count_things(len(members), 'image')}, {'equal to the byte' if is_same else 'alike'}"
        noted = [
            Named(
                name,
                f"{data.sound[name].width:,} × {data.sound[name].height:,} pixels"
                + (", copied byte for byte" if name in copies and not is_same else ""),
            )
            for name in members
        ]
        found.groups.append((f"{title}{', with different captions' if differ else ''}", noted))
    return found


def _cut(data: Examined) -> Found:
    rule = (
        f"Longer than {data.limit:,} tokens, start and end included: training does not see the rest. "
        "--max_length of the training script moves the limit. Longest first."
    )
    cut = [(n, *pair) for n, pair in zip(data.tokens or (), data.captions, strict=True) if n > data.limit]
    cut.sort(key=lambda each: -each[0])
    return _alone(
        Found("cut", "Captions that are cut", rule, "caption"),
        (
            Named(name, f"{count:,} tokens, {count - data.limit:,} cut", caption)
            for count, name, caption in cut
        ),
    )


def _repeated(data: Examined) -> Found:
    rule = "The same caption, upper and lower case aside: a model learns to say it of anything."
    found = Found("repeated", "Repeated captions", rule, "caption")
    for group in find_repeated([caption for _, caption in data.captions]):
        names = list(dict.fromkeys(data.captions[place][0] for place in group))
        if len(names) > 1:
            caption = data.captions[group[0]][1]
            found.groups.append(
                (f"{len(names):,} × “{caption}”", [Named(name, caption="") for name in names])
            )
    return found


def _spelled(data: Examined) -> Found:
    rule = (
        "Names of models' control tokens, which tools leave behind. Training takes them for plain text, and "
        "the model learns to write them."
    )
    spelled = find_spelled([caption for _, caption in data.captions], data.names)
    return _alone(
        Found("tokens", "Captions that spell a control token", rule, "caption"),
        (
            Named(data.captions[place][0], " ".join(tokens), data.captions[place][1])
            for place, tokens in spelled.items()
        ),
    )


def _without_caption(data: Examined) -> Found:
    rule = "Left out of training; a trained model captions them."
    return _alone(Found("captionless", "Images without a caption", rule), map(Named, data.without_caption))

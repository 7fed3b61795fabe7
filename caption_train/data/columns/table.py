"""Pairs of image and caption in columns, and sequences of pairs that are made when they are looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from caption_train.data.columns.texts import Texts
from caption_train.data.pairs import Pair
from caption_train.packed import Container, PackedFile

SPLITS = ("train", "validation", "test")
_TEXTS = ("names", "captions", "sources")
_NUMBERS = {
    "place": np.uint32,
    "split": np.uint8,
    "prompt": np.uint32,
    "dataset": np.uint16,
    "offset": np.int64,
    "size": np.int64,
    "pixels": np.int64,
}
_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where images are.

    Attributes:
        folder: a folder or, with a container, what a person calls it.
        container: the file that holds them.
        only: the one image here, where it is none that name, offset and size tell.
    """

    folder: str
    container: Container | None = None
    only: Path | None = None

    def open(self, name: str, offset: int, size: int) -> Path:
        """Return the path of an image here."""
        if self.only is not None:
            return self.only
        if self.container is None:
            return Path(self.folder, name)
        return PackedFile(self.folder, name, self.container, offset, size)

    @property
    def prefix(self) -> str:
        """What stands before a name in the path of an image, as a string."""
        start = str(Path(self.folder))
        return "" if start == os.curdir else start if start.endswith(os.sep) else start + os.sep

    @property
    def unpacked(self) -> str:
        """The same for the path that the image would have in a folder of the container's name."""
        if self.container is None:
            return self.prefix
        return f"{os.path.splitext(self.folder)[0]}{os.sep}"  # noqa: PTH122


@dataclass
class PairTable:
    """Pairs in columns: some 190 bytes each where captions have 60.

    Attributes:
        places: folders and containers.
        names: of the images, in their places, with `/` between parts.
        captions, sources: as in Pair.
        prompts: those that there are; the first is None.
        place, split, prompt: of each pair, its number in `places`, SPLITS and `prompts`.
        dataset: as in Pair.
        offset, size: of the image's bytes in the container; of a file of its own 0 and its size.
        pixels: of the image; 0 where nobody has looked at it.
        digest: SHA-256 of the image's bytes, 32 of uint8 each; zeros where nobody has looked.
    """

    places: list[Place]
    names: Texts
    captions: Texts
    sources: Texts
    prompts: list[str | None]
    place: np.ndarray
    split: np.ndarray
    prompt: np.ndarray
    dataset: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    pixels: np.ndarray
    digest: np.ndarray

    @classmethod
    def join(cls, tables: Sequence[PairTable]) -> PairTable:
        """Return the pairs of all tables, one behind the other."""
        places: dict[Place, int] = {}
        prompts: dict[str | None, int] = {None: 0}
        columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in _NUMBERS.items()}
        for table in tables:
            own = {name: getattr(table, name) for name in _NUMBERS}
            own["place"] = _recode(own["place"], table.places, places)
            own["prompt"] = _recode(own["prompt"], table.prompts, prompts)
            for name, values in own.items():
                columns[name].append(values)
        return cls(
            places=list(places),
            prompts=list(prompts),
            digest=np.concatenate([np.empty((0, 32), np.uint8), *(table.digest for table in tables)]),
            **{name: Texts.join([getattr(table, name) for table in tables]) for name in _TEXTS},
            **{name: np.concatenate(values) for name, values in columns.items()},
        )

    @classmethod
    def of(
        cls,
        place: Place,
        names: Sequence[str],
        captions: Iterable[str],
        sources: Iterable[str],
        **columns: Sequence[int],
    ) -> PairTable:
        """Return pairs of images in one place.

        Args:
            place: the place.
            names, captions, sources: of the pairs.
            columns: others that are not 0 throughout.
        """
        count = len(names)
        return cls(
            places=[place],
            prompts=[None],
            names=Texts.of(names),
            captions=Texts.of(captions),
            sources=Texts.of(sources),
            digest=np.zeros((count, 32), np.uint8),
            **{
                name: np.array(columns[name], kind) if name in columns else np.zeros(count, kind)
                for name, kind in _NUMBERS.items()
            },
        )

    def __len__(self) -> int:
        return len(self.place)

    def take(self, rows: np.ndarray) -> PairTable:
        """Return the pairs of some rows, in their order."""
        columns = {name: getattr(self, name)[rows] for name in (*_NUMBERS, "digest")}
        texts = {name: getattr(self, name).take(rows) for name in _TEXTS}
        return replace(self, **columns, **texts)

    def pair(self, row: int) -> Pair:
        """Return one pair."""
        return Pair(
            self.image(row),
            self.captions[row],
            self.sources[row],
            SPLITS[self.split[row]],
            self.prompts[self.prompt[row]],
            int(self.dataset[row]),
        )

    def image(self, row: int) -> Path:
        """Return the path of a pair's image."""
        place = self.places[self.place[row]]
        return place.open(self.names[row], int(self.offset[row]), int(self.size[row]))

    def image_names(self, rows: np.ndarray, *, unpacked: bool = False) -> Iterator[str]:
        """Yield the paths of images as strings; unpacked: as if containers were folders."""
        starts = [place.unpacked if unpacked else place.prefix for place in self.places]
        only = {number: str(place.only) for number, place in enumerate(self.places) if place.only is not None}
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            for place, name in zip(self.place[some].tolist(), self.names.select(some), strict=True):
                yield only.get(place) or starts[place] + (
                    name if os.sep == "/" else name.replace("/", os.sep)
                )


def _recode(codes: np.ndarray, values: Sequence[Any], known: dict[Any, int]) -> np.ndarray:
    """Return codes of the same values in another list, which gets those that it has not."""
    numbers = [known.setdefault(value, len(known)) for value in values]
    return np.array(numbers, np.uint32)[codes] if len(codes) else codes


@dataclass
class TableBuilder:
    """Collects pairs row by row."""

    rows: dict[str, list] = field(
        default_factory=lambda: {name: [] for name in (*_TEXTS, *_NUMBERS, "digest")}
    )
    places: dict[Place, int] = field(default_factory=dict)
    prompts: dict[str | None, int] = field(default_factory=lambda: {None: 0})

    def add(
        self,
        place: Place,
        name: str,
        caption: str,
        source: str,
        *,
        split: str = "train",
        prompt: str | None = None,
        dataset: int = 0,
        span: tuple[int, int] = (0, 0),
        digest: str = "",
        pixels: int = 0,
    ) -> None:
        """Add a pair; see PairTable."""
        rows = self.rows
        rows["place"].append(self.places.setdefault(place, len(self.places)))
        rows["names"].append(name)
        rows["captions"].append(caption)
        rows["sources"].append(source)
        rows["split"].append(SPLITS.index(split))
        rows["prompt"].append(self.prompts.setdefault(prompt, len(self.prompts)))
        rows["dataset"].append(dataset)
        rows["offset"].append(span[0])
        rows["size"].append(span[1])
        rows["digest"].append(digest)
        rows["pixels"].append(pixels)

    def build(self) -> PairTable:
        """Return what was added."""
        digests = b"".join(bytes.fromhex(digest) or bytes(32) for digest in self.rows["digest"])
        return PairTable(
            places=list(self.places),
            prompts=list(self.prompts),
            digest=np.frombuffer(bytearray(digests), np.uint8).reshape(-1, 32),
            **{name: Texts.of(self.rows[name]) for name in _TEXTS},
            **{name: np.array(self.rows[name], kind) for name, kind in _NUMBERS.items()},
        )


class Pairs(Sequence[Pair]):
    """Some pairs of a table, in an order: a sequence of Pair, each made when it is asked for.

    Args:
        table: the table.
        rows: numbers of its rows; all if not given. A row may be there several times.
    """

    def __init__(self, table: PairTable, rows: np.ndarray | None = None) -> None:
        self.table = table
        self.rows = np.arange(len(table)) if rows is None else rows

    @classmethod
    def of(
        cls,
        pairs: Iterable[Pair],
        digests: Mapping[Path, str] | None = None,
        pixels: Mapping[Path, int] | None = None,
    ) -> Pairs:
        """Return pairs in a table, with what is known of their images."""
        builder = TableBuilder()
        for pair in pairs:
            place, name, span = _locate(pair.image)
            builder.add(
                *(place, name, pair.caption, pair.source),
                split=pair.split,
                prompt=pair.prompt,
                dataset=pair.dataset,
                span=span,
                digest=(digests or {}).get(pair.image, ""),
                pixels=(pixels or {}).get(pair.image, 0),
            )
        return cls(builder.build())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pairs(self.table, self.rows[index])
        return self.table.pair(int(self.rows[index]))

    def __iter__(self) -> Iterator[Pair]:
        return map(self.table.pair, self.rows.tolist())

    def __add__(self, other: Pairs) -> Pairs:
        """Return the pairs of both; they must be of one table."""
        if other.table is not self.table:
            return NotImplemented
        return Pairs(self.table, np.concatenate([self.rows, other.rows]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} pairs>"

    def keep(self, wanted: np.ndarray) -> Pairs:
        """Return the pairs for which a column of truth values says so."""
        return Pairs(self.table, self.rows[wanted])

    def captions(self) -> Iterator[str]:
        """Yield the captions."""
        return self.table.captions.select(self.rows)

    @property
    def pixels(self) -> np.ndarray:
        """How many pixels each pair's image has."""
        return self.table.pixels[self.rows]

    def prompts(self) -> list[str | None]:
        """Return the prompt of each pair."""
        prompts = self.table.prompts
        return [prompts[code] for code in self.table.prompt[self.rows].tolist()]

    def splits(self) -> list[str]:
        """Return the split of each pair."""
        return [SPLITS[code] for code in self.table.split[self.rows].tolist()]

    def digests(self) -> Iterator[str]:
        """Yield the SHA-256 of each pair's image, in hexadecimal."""
        for start in range(0, len(self), _AT_ONCE):
            content = self.table.digest[self.rows[start : start + _AT_ONCE]].tobytes()
            for place in range(0, len(content), 32):
                yield content[place : place + 32].hex()

    def image_names(self, *, unpacked: bool = False) -> Iterator[str]:
        """Yield the path of each pair's image as a string; unpacked: as if containers were folders."""
        return self.table.image_names(self.rows, unpacked=unpacked)


def _locate(image: Path) -> tuple[Place, str, tuple[int, int]]:
    """Return place, name and span of an image."""
    if not isinstance(image, PackedFile):
        folder, name = os.path.split(image)
        return Place(folder), name, (0, 0)
    if image.container is None:
        return Place("", None, image), image.inner, image.span
    return Place(str(image.folder), image.container), image.inner, image.span

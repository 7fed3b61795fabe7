"""Holds what the compile command found and did."""

from dataclasses import dataclass, field
from pathlib import Path

from caption_train.data.pairs import Matches, Pair
from caption_train.data.scan import Folder


@dataclass
class Compiled:
    """What one run found and did. Names are relative to the dataset folder.

    Attributes:
        folder: the scanned dataset folder.
        matches: captions matched with images.
        output_dir: where metadata.jsonl is written.
        prefix: the path from output_dir to the dataset folder; None if images have to be placed.
        pairs: image → pair, for the pairs that are written.
        more: image → further captions of it, beside that of its pair.
        sources: file of `--captions` → how many captions it gave.
        source_problems: one line per entry of these files that was not used.
        kohya_metadata: the Kohya JSON that was read, if any.
        kohya_problems: one line per entry of it that was not used.
        repeats: folder `N_name` → N.
        unrepeated: images in folders that ask for 0 repeats.
        unnamable: images whose names a metadata.jsonl cannot hold.
        bad_images: image → why it cannot be decoded.
        disagreeing: a line for each group of equal images with different captions.
        token_like: a line for each caption that spells out a token, such as `</s>`.
        held_out: images of the validation split.
        rows: the rows of metadata.jsonl.
        placed: how many images were put into output_dir.
        copied: how many of these are copies, not hard links.
        written: whether metadata.jsonl was written.
        report: the page about the dataset, if it was written.
    """

    folder: Folder
    matches: Matches
    output_dir: Path
    prefix: str | None
    pairs: dict[str, Pair]
    more: dict[str, list[Pair]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    source_problems: list[str] = field(default_factory=list)
    kohya_metadata: Path | None = None
    kohya_problems: list[str] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)
    unrepeated: list[str] = field(default_factory=list)
    unnamable: list[str] = field(default_factory=list)
    bad_images: dict[str, str] = field(default_factory=dict)
    disagreeing: list[str] = field(default_factory=list)
    token_like: list[str] = field(default_factory=list)
    held_out: set[str] = field(default_factory=set)
    rows: list[dict[str, str]] = field(default_factory=list)
    placed: int = 0
    copied: int = 0
    written: bool = False
    report: Path | None = None

    def file_name(self, name: str) -> str:
        """Return an image's `file_name` in the metadata.jsonl of output_dir."""
        return (self.prefix or "") + name

    def repeats_of(self, name: str) -> int:
        """Return how many repeats the folder of an image asks for."""
        return self.repeats.get(name.rpartition("/")[0], 1)

    def pairs_of(self, name: str) -> list[Pair]:
        """Return all pairs of an image."""
        return [self.pairs[name], *self.more.get(name, ())]

    @property
    def damaged(self) -> int:
        """How many files should have become a pair but could not be used."""
        return len(self.matches.unreadable) + len(self.unnamable) + len(self.bad_images)

    def list_damaged(self) -> list[str]:
        """Return a line for each file that should have become a pair but could not be used."""
        unnamable = [f"{name}: a name that metadata.jsonl cannot carry" for name in self.unnamable]
        images = [f"{name}: {reason}" for name, reason in self.bad_images.items()]
        return [*self.matches.unreadable, *unnamable, *images]

"""What compiling a folder found."""

from dataclasses import dataclass, field
from pathlib import Path

from caption_train.data.pairs import Matches, Pair
from caption_train.data.scan import Folder


@dataclass
class Compiled:
    """What one run found and did; names are relative to the dataset folder.

    prefix: the way from output_dir to the dataset folder, None where images have to be placed. pairs: what is
    written, by image. held_out: images of the validation split. repeats: folder `N_name` → N. unrepeated:
    images in folders that ask for none. unnamable: images whose names a metadata.jsonl cannot carry.
    bad_images: name → reason. kohya_problems: a line each. placed, copied: images put into output_dir.
    """

    folder: Folder
    matches: Matches
    output_dir: Path
    prefix: str | None
    pairs: dict[str, Pair]
    kohya_metadata: Path | None = None
    kohya_problems: list[str] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)
    unrepeated: list[str] = field(default_factory=list)
    unnamable: list[str] = field(default_factory=list)
    bad_images: dict[str, str] = field(default_factory=dict)
    held_out: set[str] = field(default_factory=set)
    rows: list[dict[str, str]] = field(default_factory=list)
    placed: int = 0
    copied: int = 0
    written: bool = False

    def file_name(self, name: str) -> str:
        """Return an image's path as the metadata.jsonl in output_dir has it."""
        return (self.prefix or "") + name

    def repeats_of(self, name: str) -> int:
        """Return how often the folder of an image asks for it."""
        return self.repeats.get(name.rpartition("/")[0], 1)

    @property
    def damaged(self) -> int:
        """How many files should have become a pair and could not be used."""
        return len(self.matches.unreadable) + len(self.unnamable) + len(self.bad_images)

"""`--shard 2/8`: the part of the images that one of several independent jobs captions. No torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shard:
    """One of `count` parts, `index` of 1 to `count`.

    >>> shards = [Shard(index, 2) for index in (1, 2)]
    >>> [[name for name in ("a.png", "b.png", "sub/c.png") if shard.has(name)] for shard in shards]
    [['a.png'], ['b.png', 'sub/c.png']]
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> "Shard | None":
        """Return what a checked `--shard` says."""
        return None if text is None else cls(*map(int, text.split("/")))

    def number_of(self, label: str) -> int:
        """Return the shard of an image: by its name alone, so that no other image and no caption moves it.

        label: the path of the image below what `--images` names, with `/` between its parts.
        """
        digest = hashlib.blake2b(label.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) % self.count + 1

    def has(self, label: str) -> bool:
        """Tell whether an image is in this shard."""
        return self.number_of(label) == self.index

    def path_of(self, output: Path) -> Path:
        """Return where this shard's captions go that are `output`'s when all are merged.

        >>> Shard(2, 8).path_of(Path("photos/captions.jsonl")).as_posix()
        'photos/captions.shard-2-of-8.jsonl'
        """
        return output.with_name(f"{output.stem}.{self.name}{output.suffix}")

    @property
    def name(self) -> str:
        """What files of this shard are called by."""
        return f"shard-{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

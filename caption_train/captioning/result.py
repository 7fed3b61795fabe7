"""The result of captioning one image: a caption, or the reason why there is none. No torch."""

from dataclasses import dataclass
from pathlib import Path

from caption_train.families.base import Generated


@dataclass(frozen=True)
class CaptionResult:
    """A captioned image. size: its (width, height) in pixels, upright."""

    image: Path
    size: tuple[int, int]
    generated: Generated


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be captioned. reason: one line that begins with its path."""

    image: Path
    reason: str

"""What a captioning run works on: images, model, prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaptionPlan:
    """images: all that were asked for, in order. pending: those to caption now. model_id, …: with what."""

    images: Sequence[Path]
    pending: Sequence[Path]
    missing: Sequence[str]
    model_id: str
    revision: str | None
    prompt: str

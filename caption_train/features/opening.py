"""Opens the folder that the features of a model's images are kept in, and finds how many it has room for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from caption_train.errors import CaptionTrainError
from caption_train.families.base import Family
from caption_train.features.encoder import KeepingEncoder, fingerprint_encoder
from caption_train.features.source import FeatureSource, Keeping
from caption_train.features.store import FeatureStore, clear_leftovers, make_room, measure_room
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.files import cache_folder

KEPT_FREE = 1 << 30
"""Bytes of the disk that are never filled with features."""


class Opening:
    """The steps from a model to kept features: know its tower, `prepare` the folder, `start`.

    Args:
        model: the model, on its device; its vision tower keeps features from now on.
        family: the model's family.
        processor: the model's processor.
        digests: image → SHA-256 of its bytes.
        prompt: a prompt that the family reads, to try the tower with.
        precision: what the features depend on besides weights and device, such as the mixed precision.
        around: the context in which the tower runs.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        processor: Any,
        digests: Mapping[Path, str],
        prompt: str,
        *,
        precision: str,
        around: AbstractContextManager | None = None,
    ) -> None:
        self.digests = digests
        self.encoder = KeepingEncoder(model, family)
        device = next(model.parameters()).device
        settings = {
            "images": str(processor.image_processor),
            "settings": family.read_settings(processor),
            "precision": precision,
            "device": device.type,
            "torch": torch.__version__,
        }
        self.store = FeatureStore(
            cache_folder("features") / fingerprint_encoder(self.encoder.modules, settings)
        )
        self.names = set(digests.values())
        self.missing = sum(not self.store.has(name) for name in self.names)
        self.size = self.store.find_size()
        if self.size is None:
            batch = family.encode(processor, [Image.new("RGB", (32, 32))], [prompt])
            with around or nullcontext():
                batch = move_batch(batch, device, model_dtype(self.encoder.owner))
                self.size = self.encoder.encode_one(batch, family.image_inputs).nbytes

    def prepare(self, limit: int | None) -> None:
        """Make the folder, and room in those of other models if there is a limit; one process does it.

        Args:
            limit: how many bytes all features may have; None leaves half of the free disk free.

        Raises:
            CaptionTrainError: the folder cannot be made.
        """
        try:
            self.store.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CaptionTrainError(
                f"--cache_features: {self.store.folder} cannot be made: {error.strerror}; $XDG_CACHE_HOME "
                "moves it"
            ) from error
        clear_leftovers(self.store.folder)
        if limit is not None:
            make_room(self.store.folder.parent, limit, self.missing * self.size, self._is_own)

    def start(self, limit: int | None, processes: int = 1) -> tuple[Keeping, str]:
        """Begin to keep features.

        Args:
            limit: as for `prepare`.
            processes: how many share the room.

        Returns:
            The two ends, and a line on what they will need.
        """
        found = measure_room(self.store.folder.parent)
        left = max(0, found.free - KEPT_FREE)
        room = left // 2 if limit is None else max(0, min(left, limit - found.used))
        self.store.room = room // processes
        self.encoder.store = self.store
        return Keeping(self.encoder, FeatureSource(self.store, self.digests)), self._describe(room)

    def _is_own(self, path: Path) -> bool:
        return path.is_relative_to(self.store.folder) and path.stem in self.names

    def _describe(self, room: int) -> str:
        count, megabytes = len(self.names), len(self.names) * self.size / 1e6
        line = f"--cache_features: {megabytes:,.1f} MB for {count:,} images in {self.store.folder}"
        if self.missing < count:
            line += f", {count - self.missing:,} of them are there already"
        if self.missing * self.size > room:
            line += (
                f"; there is room for {room // self.size:,} of the other {self.missing:,}: the rest is "
                "computed each time (--cache_limit)"
            )
        return line

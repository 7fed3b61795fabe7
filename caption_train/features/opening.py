"""Opens the folder that the features of a model's images are kept in, and finds how many it has room for."""

from __future__ import annotations

import errno
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family
from caption_train.families.image_encoder import Tensors
from caption_train.features.encoder import KeepingEncoder, fingerprint_encoder
from caption_train.features.source import FeatureSource, Keeping, attach_rows
from caption_train.features.store import KEPT_FREE, FeatureStore, clear_leftovers, make_room, measure_room
from caption_train.packed import open_regular
from caption_train.system.devices import model_dtype, move_batch
from caption_train.system.files import cache_folder

ENOUGH = 16
"""With as many kept files, they say how large the next ones will be."""
SAMPLED = 8
"""How many images are looked at for their size, where features are larger for larger images."""


class Opening:
    """The steps from a model to kept features: know its tower, `prepare` the folder, `start`.

    Args:
        model: the model, on its device; its vision tower keeps features from now on.
        family: the model's family.
        processor: the model's processor.
        digests: image → SHA-256 of its bytes.
        prompt: a prompt that the family reads, to try the tower with.
        precision: what the features depend on besides weights and device, such as the mixed precision.
        limit: how many bytes the features of all runs may have; None leaves half of the free disk free.
        around: makes the context in which the model runs.

    Raises:
        UsageError: this kind of model cannot be given features.
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
        limit: int | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.family, self.processor, self.digests, self.limit = family, processor, digests, limit
        self.encoder = KeepingEncoder(model, family, around)
        tower = self.encoder.tower
        settings = {
            "images": str(processor.image_processor),
            "settings": family.read_settings(processor),
            "precision": precision,
            "device": next(model.parameters()).device.type,
            "torch": torch.__version__,
        }
        fingerprint = fingerprint_encoder(tower.modules, settings, tower.parameters)
        self.store = FeatureStore(cache_folder("features") / fingerprint)
        self.names = set(digests.values())
        sizes = [size for name in self.names if (size := self.store.size_of(name)) is not None]
        self.missing = len(self.names) - len(sizes)
        if len(sizes) < ENOUGH or tower.is_given:
            probe = self._probe(prompt)
        if len(sizes) < ENOUGH:
            self.size = int(sum(tensor.nbytes for tensor in probe.values()) * self._weigh_images())
        else:
            # Not the mean where all are equal: a damaged file has any size.
            self.size = int(statistics.mean(sizes) if family.features_vary else statistics.median(sizes))

    def _probe(self, prompt: str) -> Tensors:
        """Return the features of a blank image, and see that the model takes them."""
        blank = self.family.hold_image(Path("blank"), Image.new("RGB", (32, 32)), {})
        batch = self.family.encode(self.processor, [blank], [prompt])
        if self.encoder.tower.is_given:
            self._compare(attach_rows(self.family, batch, [{"image": blank}]), prompt)
        return self.encoder.encode_one(batch)

    @torch.no_grad()
    def _compare(self, given: dict[str, Any], prompt: str) -> None:
        """Refuse a model that makes something else of given features than of the image itself."""
        model = self.encoder.model
        plain = self.family.encode(self.processor, [Image.new("RGB", (32, 32))], [prompt])
        was_training = model.training
        model.eval()
        try:
            with self.encoder.around(), self.encoder.given(given) as given:
                device, dtype = next(model.parameters()).device, model_dtype(model)
                logits = [
                    model(**move_batch(batch, device, dtype)).logits.float() for batch in (plain, given)
                ]
        finally:
            model.train(was_training)
        if not torch.allclose(*logits, rtol=1e-2, atol=1e-2 * float(logits[0].abs().max())):
            raise UsageError(
                f"--cache_features: a {model.config.model_type} model reads features that it is given in "
                "another way than an image: drop it"
            )

    def _weigh_images(self) -> float:
        """Return how many times the features of the blank image those of the run's images have."""
        if not self.family.features_vary:
            return 1.0
        sizes = []
        for path in sorted(self.digests, key=self.digests.__getitem__)[:SAMPLED]:
            with suppress(OSError, ValueError), open_regular(path) as file:
                sizes.append(Image.open(file).size)
        if not sizes:
            return 1.0
        blank, *weights = (self.family.weigh_image(self.processor, size) for size in ((32, 32), *sizes))
        return statistics.mean(weights) / blank

    def prepare(self) -> None:
        """Make the folder, and room in those of other models if there is a limit; one process does it.

        Raises:
            CaptionTrainError: the folder cannot be made.
        """
        try:
            self.store.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # On a full disk the run goes on, and keeps nothing.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise CaptionTrainError(
                    f"--cache_features: {self.store.folder} cannot be made: {error.strerror}; "
                    "$XDG_CACHE_HOME moves it"
                ) from error
        clear_leftovers(self.store.folder)
        if self.limit is not None:
            make_room(self.store.folder.parent, self.limit, self.missing * self.size, self._is_own)

    def start(self, processes: int = 1, report: Callable[[str], Any] | None = None) -> tuple[Keeping, str]:
        """Begin to keep features.

        Args:
            processes: how many share the room.
            report: called with a line when there is no room left, or the disk refuses.

        Returns:
            The two ends, and a line on what they will need.
        """
        found = measure_room(self.store.folder.parent)
        left = max(0, found.free - KEPT_FREE)
        if self.limit is None:
            room = left // 2
            self.store.room = room // processes
        else:
            room = max(0, min(left, self.limit - found.used))
            self.store.room, self.store.limit = 0, self.limit
        # Where the line says that there is too little room, it need not be said again.
        is_enough = self.missing * self.size <= room
        self.encoder.store, self.encoder.report = self.store, report if is_enough else None
        source = FeatureSource(self.store, self.digests, self.family)
        return Keeping(self.encoder, source), self._describe(room, found.free)

    def _is_own(self, path: Path) -> bool:
        return path.is_relative_to(self.store.folder) and path.stem in self.names

    def _describe(self, room: int, free: int) -> str:
        count, megabytes = len(self.names), len(self.names) * self.size / 1e6
        about = "about " if self.family.features_vary else ""
        line = f"--cache_features: {about}{megabytes:,.1f} MB for {count:,} images in {self.store.folder}"
        if self.missing < count:
            line += f", {count - self.missing:,} of them are there already"
        if self.missing * self.size > room:
            is_disk = self.limit is None or room == max(0, free - KEPT_FREE)
            reason = f"the disk has {free / 1e9:,.1f} GB free" if is_disk else "--cache_limit"
            line += (
                f"; there is room for {room // self.size:,} of the other {self.missing:,} ({reason}), the "
                "rest is encoded in each epoch"
            )
        return line

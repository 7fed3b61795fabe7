"""Lets a model's vision tower return kept features, and keep those that it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from caption_train.families.base import Batch, Family
from caption_train.features.store import FeatureStore

FORMAT = 1
"""To be raised whenever what is kept for the same weights and image changes."""
ROWS = "feature_rows"
"""The entry of a batch that says where the features of its images come from."""


@dataclass
class Rows:
    """Where the features of a batch's B images come from.

    Attributes:
        digests: of each image the name that its features are kept under; None keeps none.
        kept: the places in the batch of the images whose features were read.
        features: those features, [len(kept), …]; None if there are none.
    """

    digests: Sequence[str | None]
    kept: Sequence[int] = ()
    features: torch.Tensor | None = None

    def map_tensors(self, change: Callable[[torch.Tensor], Any]) -> Rows:
        """Return the same with changed features, as `hand_over` sends them to another process."""
        return replace(self, features=None if self.features is None else change(self.features))

    def pin_memory(self) -> Rows:
        """Copy the features to page-locked memory. The DataLoader calls this."""
        return self.map_tensors(torch.Tensor.pin_memory)


class KeepingEncoder:
    """A model's vision tower that computes each image once.

    The tower must be frozen. It is put into eval mode for good, because features with random layers left
    out (stochastic depth) would not be worth keeping. Images are encoded one at a time:
    in half precision, what a matrix product makes of a row depends on how many rows there are, and features
    must not depend on which images shared their first batch.

    Args:
        model: the model, without wrappers around it.
        family: the model's family.

    Attributes:
        store: where features are kept; without one, all are computed.
        computed: how many images were encoded, and not found among those that are kept.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.store: FeatureStore | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.owner, self.method, self.modules = family.find_image_encoder(base)
        self._encode: Callable[..., Any] = getattr(self.owner, self.method)
        self._rows: Rows | None = None
        self.computed = 0
        self._split = family.split_images
        setattr(self.owner, self.method, self)
        for module in self.modules:
            stay_in_eval_mode(module)

    def __call__(self, pixel_values: torch.Tensor, *args: torch.Tensor, **kwargs: Any) -> Any:
        """Return what the tower returns, for the images of the batch in their order.

        Args:
            pixel_values: of the images whose features are not kept; all others have no rows in it.
            args: what else the tower is given of an image, with the same rows.
        """
        rows = self._rows
        if rows is None:
            return self._encode(pixel_values, *args, **kwargs)
        missing = [place for place in range(len(rows.digests)) if place not in rows.kept]
        found: dict[int, torch.Tensor] = {}
        if rows.features is not None:
            for place, features in zip(rows.kept, rows.features, strict=True):
                found[place] = features.to(pixel_values.device, non_blocking=True)
        with torch.no_grad():
            for place, image in zip(missing, self._split(pixel_values, *args), strict=True):
                found[place] = self._find(rows.digests[place], image, kwargs)
        features = torch.stack([found[place] for place in range(len(rows.digests))])
        return _wrap(features) if self.method == "forward" else features

    def _find(self, digest: str | None, image: tuple[torch.Tensor, ...], kwargs: dict) -> torch.Tensor:
        """Return an image's features: computed since its batch was made, or computed now."""
        kept = self.store.read(digest) if digest and self.store else None
        if kept is not None:
            return kept.to(image[0].device)
        self.computed += 1
        features = _features_of(self._encode(*image, **kwargs))[0]
        if digest and self.store:
            self.store.write(digest, features)
        return features

    def encode_one(self, batch: Batch, names: Sequence[str]) -> torch.Tensor:
        """Return the features of a batch's first image; `names` are the entries that the tower takes."""
        with torch.no_grad():
            image = self._split(*(batch[name] for name in names))[0]
            return _features_of(self._encode(*image))[0]

    @contextmanager
    def given(self, batch: Batch) -> Iterator[Batch]:
        """Encode a batch's images as its `feature_rows` say; yield the batch without that entry."""
        batch = dict(batch)
        self._rows = batch.pop(ROWS, None)
        try:
            yield batch
        finally:
            self._rows = None


def _features_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def _wrap(features: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=features)


def stay_in_eval_mode(module: nn.Module) -> None:
    """Put a module into eval mode, and keep it there when the model around it is put into train mode."""
    module.eval()
    module.train = lambda mode=True: module


def fingerprint_encoder(modules: Sequence[nn.Module], settings: dict[str, Any]) -> str:
    """Return what identifies the features of a tower.

    Args:
        modules: the tower.
        settings: how images are prepared for it and in which precision it runs; values that JSON can hold.

    Returns:
        32 hexadecimal digits of a SHA-256 over the weights and the settings.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode())
    for module in modules:
        digest.update(str(getattr(module, "config", "")).encode())
        for name, layer in module.named_modules():
            # An adapter's strength is in no tensor: --alpha may be edited in its adapter_config.json.
            if scaling := getattr(layer, "scaling", None):
                digest.update(f"{name} {type(layer).__name__} {scaling}".encode())
        for name, tensor in sorted(module.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]

"""Lets a model's vision tower return kept features, and keep those that it computes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from caption_train.families.base import Batch, Family
from caption_train.families.image_encoder import SINGLES, SIZE, Tensors
from caption_train.features.rows import ROWS, Rows, unpack
from caption_train.features.store import FeatureStore
from caption_train.system.devices import model_dtype, move_batch

FORMAT = 2
"""To be raised whenever what is kept for the same weights and image changes."""

Call = tuple[Sequence[torch.Tensor], Mapping[str, Any]]
"""The arguments of a tower's method for one image."""


class KeepingEncoder:
    """A model's vision tower that computes each image once.

    The tower must be frozen. It is put into eval mode for good, because features with random layers left
    out (stochastic depth) would not be worth keeping. Images are encoded one at a time:
    in half precision, what a matrix product makes of a row depends on how many rows there are, and features
    must not depend on which images shared their first batch.

    Args:
        model: the model, without wrappers around it.
        family: the model's family.
        around: makes the context in which the tower runs where the model does not call it.

    Attributes:
        tower: the family's description of the tower.
        store: where features are kept; without one, all are computed.
        computed: how many images with a digest were encoded, and not found among those that are kept.
        report: called with a line when there is no room left.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.store: FeatureStore | None = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.tower, self.around = base, family.find_image_encoder(base), around
        self._encode: Callable[..., Any] = getattr(self.tower.owner, self.tower.method)
        self._rows: Rows | None = None
        self.computed = 0
        self.report: Callable[[str], Any] | None = None
        self._family = family
        if not self.tower.is_given:
            setattr(self.tower.owner, self.tower.method, self)
        for module in self.tower.modules:
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
        calls = [(image, kwargs) for image in self._family.split_images(pixel_values, *args)]
        return self.tower.join(self._collect(rows, calls, pixel_values.device))

    def _collect(self, rows: Rows, calls: Sequence[Call], device: torch.device) -> list[Tensors]:
        """Return the features of all images of a batch; `calls` are for those that were not read."""
        found: dict[int, Tensors] = {}
        for place, features in zip(rows.kept, unpack(rows.features), strict=True):
            found[place] = _move(features, device)
        with torch.no_grad():
            for place, call in zip(rows.missing, calls, strict=True):
                size = rows.sizes[place] if self.tower.is_given else None
                found[place] = _move(self._find(rows.digests[place], call, size), device)
        return [found[place] for place in range(len(rows.digests))]

    def _find(self, digest: str | None, call: Call, size: tuple[int, int] | None) -> Tensors:
        """Return an image's features: computed since its batch was made, or computed now."""
        kept = self.store.read(digest) if digest and self.store else None
        if kept is not None:
            return kept
        self.computed += digest is not None
        features = self.tower.take(self._encode(*call[0], **call[1]))
        if digest and self.store:
            self._keep(digest, features | ({SIZE: torch.tensor(size)} if size else {}))
        return features

    def _keep(self, digest: str, features: Tensors) -> None:
        if not self.store.write(digest, features) and self.report:
            reason = self.store.problem or "there is no room left"
            self.report(
                f"--cache_features: {self.store.folder}: {reason}: images without kept features are encoded "
                "in each epoch"
            )
            self.report = None

    def encode_one(self, batch: Batch) -> Tensors:
        """Return the features of the first image of a batch that `Family.encode` made."""
        with torch.no_grad(), self.around():
            if singles := batch.get(SINGLES):
                args, kwargs = self._give(singles[0].inputs)
            else:
                inputs = _move_like(batch, self.tower.owner)
                args, kwargs = self._family.split_images(*map(inputs.get, self._family.image_inputs))[0], {}
            return self.tower.take(self._encode(*args, **kwargs))

    def _give(self, inputs: Tensors) -> Call:
        known = inspect.signature(self._encode).parameters
        moved = _move_like(inputs, self.model)
        return (), {name: value for name, value in moved.items() if name in known}

    @contextmanager
    def given(self, batch: Batch) -> Iterator[Batch]:
        """Encode a batch's images as its `feature_rows` say; yield the batch without that entry."""
        batch = dict(batch)
        rows = batch.pop(ROWS, None)
        if self.tower.is_given:
            if rows is not None and rows.inputs is not None:
                calls = [self._give(image) for image in unpack(rows.inputs)]
                with self.around():
                    features = self._collect(rows, calls, next(self.model.parameters()).device)
                batch |= self.tower.join(features)
            yield batch
            return
        self._rows = rows
        try:
            yield batch
        finally:
            self._rows = None


def _move(features: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in features.items()}


def _move_like(inputs: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    return move_batch(inputs, next(module.parameters()).device, model_dtype(module))


def stay_in_eval_mode(module: nn.Module) -> None:
    """Put a module into eval mode, and keep it there when the model around it is put into train mode."""
    module.eval()
    module.train = lambda mode=True: module


def fingerprint_encoder(
    modules: Sequence[nn.Module], settings: dict[str, Any], parameters: Tensors | None = None
) -> str:
    """Return what identifies the features of a tower.

    Args:
        modules: the tower.
        settings: how images are prepared for it and in which precision it runs; values that JSON can hold.
        parameters: what it uses besides.

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
        _digest_tensors(digest, module.state_dict())
    _digest_tensors(digest, parameters or {})
    return digest.hexdigest()[:32]


def _digest_tensors(digest: Any, tensors: Mapping[str, Any]) -> None:
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

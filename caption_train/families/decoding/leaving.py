"""Rows of a batch whose caption is finished leave it, so that decoding steps of the others cost less.

transformers' `generate` feeds padding to a finished row until the last row is finished. Its loop stays as it
is, with all rows in it, and so do logits processors, stopping criteria and random numbers. The model alone
gets fewer rows: hooks around its forward take those of unfinished captions out of its inputs and its cache,
and put the scores back in their places. Finished rows have scores of 0, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode

SHARE = 0.25
"""The share of the model's rows that must be finished: to let them go costs a copy of the others' cache."""
PLACES = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask"), 0),
    **dict.fromkeys(("token_type_ids", "mm_token_type_ids"), 0),
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask", "encoder_outputs"), 0),
    **dict.fromkeys(("position_ids", "decoder_position_ids"), -2),
}
"""The inputs of a decoding step that have a row for each caption, and the dimension of the rows."""
WITH_PIXELS = ("image_grid_thw", "video_grid_thw")
"""Inputs that every step is given, but which are read with the pixels, at the first one, only."""
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@contextmanager
def letting_rows_leave(model: PreTrainedModel, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Have `model.generate` leave finished rows out of its decoding steps; yields its arguments.

    The tokens are those of the plain `generate`, up to rounding.

    Args:
        model: what generates; it may have an adapter, inside or around it.
        settings: generation arguments. With beams, or a cache that is given, all rows stay.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = settings.get("eos_token_id", inner.generation_config.eos_token_id)
    if ends is None or not _may_leave(inner, settings):
        yield dict(settings)
        return
    rows = Rows([ends] if isinstance(ends, int) else ends)
    before = inner.register_forward_pre_hook(rows.take, with_kwargs=True)
    after = inner.register_forward_hook(rows.put_back)
    criteria = StoppingCriteriaList([*(settings.get("stopping_criteria") or ()), rows])
    try:
        yield {**settings, "stopping_criteria": criteria}
    finally:
        before.remove()
        after.remove()


class Rows(StoppingCriteria):
    """Follows which rows are finished, and what the model is given of the others.

    It is a stopping criterion that stops nothing, because those see every token.

    Attributes:
        finished: [B], whether a row is; None before the first token.
        kept: the rows that the cache still has; None means all.
        stay: whether all rows stay in this batch, because it has something that nobody knows the rows of.
    """

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends = torch.tensor(ends)
        self.finished: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.stay = False
        self._cache: Cache | None = None
        self._is_fewer = False
        self._taken: dict[str, tuple[Any, Any]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note which rows of `input_ids` [B, T] have just got an end token; return False for each."""
        ended = torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        self.finished = ended if self.finished is None else self.finished | ended
        return torch.zeros_like(ended)

    def take(
        self, model: PreTrainedModel, arguments: tuple, keywords: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Return what the forward gets instead: the rows that go on. It is a hook before the forward."""
        self._is_fewer = False
        cache = _find_cache(keywords)
        # A logits processor may ask the model something of its own, with another cache.
        if self.finished is None or cache is None or cache is not self._cache or self.stay:
            return None
        if self.kept is None and not (_is_exact(cache) and _has_known_rows(keywords)):
            self.stay = True
            return None
        self._let_go(cache)
        if self.kept is None:
            return None
        self._is_fewer = True
        return arguments, {name: self._take(name, value) for name, value in keywords.items()}

    def put_back(self, model: PreTrainedModel, arguments: tuple, output: Any) -> Any:
        """Give the scores of all rows back. It is a hook after the forward."""
        if self._cache is None:  # the prompts were read
            self._cache = _find_cache(output)
        if not self._is_fewer:
            return None
        logits = output.logits
        output.logits = logits.new_zeros(len(self.finished), *logits.shape[1:])
        output.logits[self.kept] = logits
        return output

    def _take(self, name: str, value: Any) -> Any:
        """Return the rows of an input that go on. What is the same at every step, as of encoders, is kept."""
        if name not in PLACES:
            return value
        if name not in self._taken or self._taken[name][0] is not value:
            self._taken[name] = (value, _take(value, self.kept, PLACES[name]))
        return self._taken[name][1]

    def _let_go(self, cache: Cache) -> None:
        """Take the finished rows out of the cache, if there are enough of them."""
        going_on = ~self.finished if self.kept is None else ~self.finished[self.kept]
        left = int(going_on.sum())
        if not 0 < left <= (1 - SHARE) * len(going_on):
            return
        places = going_on.nonzero()[:, 0]
        # Made for beams that change places. Every kind of layer has it, unlike `batch_select_indices`.
        cache.reorder_cache(places)
        self.kept = places if self.kept is None else self.kept[places]
        self._taken.clear()


def _find_cache(values: Mapping[str, Any]) -> Cache | None:
    return next((value for value in values.values() if isinstance(value, Cache)), None)


def _may_leave(model: PreTrainedModel, settings: Mapping[str, Any]) -> bool:
    """Tell whether rows may leave as far as is known before the first step.

    On a GPU nobody has measured whether it pays. 8-bit layers look for outliers in all rows together, so that
    a row's scores depend on the others. A static cache, which may be compiled, has a fixed number of rows.
    """
    if model.device.type != "cpu" or getattr(model, "is_quantized", False):
        return False
    config: GenerationConfig = deepcopy(model.generation_config)
    for name, value in settings.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return (
        config.get_generation_mode(settings.get("assistant_model")) in MODES
        and config.cache_implementation in (None, "dynamic")
        and config.use_cache is not False
        and not config.return_dict_in_generate
        and {"past_key_values", "cache"}.isdisjoint(settings)
    )


def _is_exact(cache: Cache) -> bool:
    """Tell whether a cache can lose rows, and is in float32.

    In half precision, also by autocast, the number of rows changes the rounding so much that captions change.
    """
    caches = (cache,)
    if type(cache) is EncoderDecoderCache:
        caches = (cache.self_attention_cache, cache.cross_attention_cache)
    if any(type(part) is not DynamicCache for part in caches):
        return False
    kept = [getattr(layer, "keys", None) for part in caches for layer in part.layers]
    return {keys.dtype for keys in kept if keys is not None} == {torch.float32}


def _has_known_rows(keywords: Mapping[str, Any]) -> bool:
    """Tell whether it is known where the rows are in all inputs of a decoding step.

    Models that remember something of each row, `rope_deltas`, read it where positions are not given.
    """
    if "position_ids" in keywords and keywords["position_ids"] is None:
        return False
    known = {*PLACES, *WITH_PIXELS}
    return all(name in known or not _has_tensors(value) for name, value in keywords.items())


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def _take(value: Any, rows: torch.Tensor, dimension: int) -> Any:
    """Return `value`, or what is in it, with these rows only; a dimension of one row is for all of them."""
    if isinstance(value, torch.Tensor):
        return value if value.shape[dimension] == 1 else value.index_select(dimension, rows)
    if isinstance(value, Mapping):
        return type(value)(**{name: _take(item, rows, dimension) for name, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_take(item, rows, dimension) for item in value)
    return value

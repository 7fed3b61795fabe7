"""Decodes on a GPU by CUDA graphs: a step is recorded once and then replayed as one launch.

A decoding step of a captioner is some hundred small kernels, and a GPU waits for Python between them. A graph
needs tensors that stay where they are, so the keys and values of earlier tokens go into a `StaticCache` of
transformers, which is kept from batch to batch.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from caption_train.system.console import print_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records a piece of work; returns what does it again, and its result, which is overwritten each time."""
STEP = 128
"""The cache's length is a multiple of it, so that prompts of other lengths use the same graph."""


def capture_on_gpu(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record work on the current GPU, without doing it; see `Capture`."""
    graph = torch.cuda.CUDAGraph()
    # Threads that pin the next batch's memory may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


def can_be_recorded(model: PreTrainedModel) -> bool:
    """Tell whether the model's decoding steps may be the same kernels each time."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if getattr(model, "is_quantized", False):
        return False
    layers = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=1).layers
    # Sliding windows count their tokens in Python, where a graph does not look.
    return all(type(layer) is StaticLayer for layer in layers)


@dataclass
class _Graph:
    """A recorded step: what it reads, what it returns, and for which inputs it was made."""

    key: Any
    inputs: list[torch.Tensor]
    replay: Callable[[], None]
    output: Any


@dataclass
class DecodeGraphs:
    """The cache and the graph of the batches that a run captions; both are made anew for another batch size.

    Attributes:
        model: what generates, adapter inside or around it.
        capture: how to record.
        recorded: how many graphs were recorded.
        failure: why none can be, if so: the run goes on without.
    """

    model: PreTrainedModel
    capture: Capture = capture_on_gpu
    recorded: int = 0
    failure: str = ""
    _cache: Any = None
    _shape: tuple = ()
    _graph: _Graph | None = None
    _calls: int = 0
    _inner: Any = field(init=False)

    def __post_init__(self) -> None:
        is_wrapped = hasattr(self.model, "get_base_model")
        self._inner = self.model.get_base_model() if is_wrapped else self.model

    @contextmanager
    def decoding(self, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Have the model's `generate` replay its steps within; yields settings to add.

        Args:
            inputs: the batch, on the model's device.
            settings: generation arguments; `max_new_tokens` is needed.
        """
        if self.failure or "max_new_tokens" not in settings or not can_be_recorded(self._inner):
            yield {}
            return
        self._calls = 0
        plain = self._inner.forward

        @wraps(plain)
        def forward(*arguments: Any, **keywords: Any) -> Any:
            return plain(*arguments, **keywords) if arguments else self._step(plain, keywords)

        cache = self._prepare_cache(inputs["input_ids"], settings)
        self._inner.forward = forward
        try:
            yield {"past_key_values": cache}
        finally:
            del self._inner.forward

    def free(self) -> None:
        """Let go of the cache and the graph."""
        self._cache, self._graph, self._shape = None, None, ()

    def _prepare_cache(self, input_ids: torch.Tensor, settings: Mapping[str, Any]) -> Any:
        has_encoder = self._inner.config.is_encoder_decoder
        beams = settings.get("num_beams", self._inner.generation_config.num_beams) or 1
        rows, length = input_ids.shape
        needed = settings["max_new_tokens"] + (1 if has_encoder else length)
        shape = (rows, beams, length if has_encoder else 0)
        if self._shape == shape and self._cache.get_max_length() >= needed:
            self._cache.reset()
        else:
            self.free()
            self._cache = _make_cache(self._inner.config, -(-needed // STEP) * STEP, shape[-1])
            self._shape = shape
        return self._cache

    def _step(self, plain: Callable, keywords: dict[str, Any]) -> Any:
        self._calls += 1
        tensors: list[torch.Tensor] = []
        key = _describe(keywords, tensors)
        if self._graph and self._calls > 1 and key == self._graph.key:
            for kept, given in zip(self._graph.inputs, tensors, strict=True):
                if kept is not given:
                    kept.copy_(given)
            self._graph.replay()
            return self._graph.output
        # The first call reads image and prompt. The second one warms up what the third one records.
        if self._calls != 3 or self._graph:
            return plain(**keywords)
        return self._record(plain, keywords, key)

    def _record(self, plain: Callable, keywords: dict[str, Any], key: Any) -> Any:
        kept: list[torch.Tensor] = []
        own = _copy(keywords, kept)
        try:
            replay, output = self.capture(lambda: plain(**own))
        except RuntimeError as error:
            return self._give_up(str(error).splitlines()[0], plain, keywords)
        replay()
        if not self._is_right(output, plain, keywords):
            return self._give_up("a recorded step gives other scores", plain, keywords)
        self._graph = _Graph(key, kept, replay, output)
        self.recorded += 1
        return output

    def _give_up(self, reason: str, plain: Callable, keywords: dict[str, Any]) -> Any:
        self.failure = reason
        print_line(f"--cuda_graphs: going on without, {reason}")
        return plain(**keywords)

    def _is_right(self, output: Any, plain: Callable, keywords: dict[str, Any]) -> bool:
        """Tell whether the plain step gives the same scores as the recorded one, which was just replayed."""
        self._take_back_a_token()
        scores = output.logits.clone()
        wanted = plain(**keywords).logits
        if torch.allclose(scores, wanted, rtol=1e-2, atol=1e-2):
            return True
        self._take_back_a_token()
        return False

    def _take_back_a_token(self) -> None:
        """Forget the keys and values of the last token."""
        for layer in getattr(self._cache, "self_attention_cache", self._cache).layers:
            layer.cumulative_length.sub_(1)


def _make_cache(config: PreTrainedConfig, room: int, read: int) -> Any:
    """Return a cache whose tensors stay where they are, also when beams change places.

    Args:
        config: the model's.
        room: positions of the decoder.
        read: positions of the encoder, 0 where there is none.
    """
    from transformers import EncoderDecoderCache, StaticCache

    class Fixed(StaticCache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            for layer in self.layers:
                for kept in (layer.keys, layer.values):
                    kept.copy_(kept.index_select(0, beam_idx))

    class Unmoved(StaticCache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            """Do nothing: all beams of an image read the same image."""

    text = config.get_text_config(decoder=True)
    cache = Fixed(text, max_cache_len=room)
    return EncoderDecoderCache(cache, Unmoved(text, max_cache_len=read)) if read else cache


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return what must be equal for a graph to serve; add the tensors in `value` to the list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return (tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return tuple((name, _describe(item, tensors)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_describe(item, tensors) for item in value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _copy(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return `value` with copies of its tensors, which are added to the list in `_describe`'s order."""
    if isinstance(value, torch.Tensor):
        tensors.append(value.clone())
        return tensors[-1]
    if isinstance(value, Mapping):
        return type(value)(**{name: _copy(item, tensors) for name, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item, tensors) for item in value)
    return value

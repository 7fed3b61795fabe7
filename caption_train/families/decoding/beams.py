"""What a beam search need not do again: keys and values of an image are the same for all its beams."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def sharing_image(
    model: PreTrainedModel, settings: Mapping[str, Any], defaults: GenerationConfig, projections: str
) -> Iterator[dict[str, Any]]:
    """Have a beam search make keys and values of an image once, and not move them; yields its arguments.

    transformers repeats what the encoder says for each beam, and makes keys and values of it in every layer.
    When beams change places, it moves those of their tokens and those of the image, at every token.

    Args:
        model: the model, or its decoder; it may have an adapter.
        settings: generation arguments. A cache that is given stays, and nothing is shared.
        defaults: those of the checkpoint.
        projections: a regular expression that matches the names of the layers that make keys and values of
            the image.
    """
    beams = settings.get("num_beams", defaults.num_beams) or 1
    keeps_none = settings.get("use_cache", defaults.use_cache) is False
    if beams == 1 or keeps_none or not {"past_key_values", "num_return_sequences"}.isdisjoint(settings):
        yield dict(settings)
        return
    from transformers import DynamicCache, EncoderDecoderCache

    class Unmoved(DynamicCache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            """Do nothing."""

    config, pattern = model.config.get_text_config(decoder=True), re.compile(projections)
    cache = EncoderDecoderCache(DynamicCache(config=config), Unmoved(config=config))
    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if pattern.fullmatch(name):
                before = layer.register_forward_pre_hook(lambda _, states: (states[0][::beams], *states[1:]))
                after = layer.register_forward_hook(lambda _, __, made: made.repeat_interleave(beams, dim=0))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        yield {**settings, "past_key_values": cache}

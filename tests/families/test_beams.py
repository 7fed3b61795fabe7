"""A beam search makes keys and values of an image once for all its beams, and never moves them."""

from contextlib import nullcontext

import pytest
import torch
from transformers import cache_utils

from caption_train.families import get_family
from caption_train.families.decoding import beams
from tests.fixtures.photos import draw_photo

PROJECTIONS = {"blip": "crossattention.self.key", "florence": "encoder_attn.k_proj"}
BEAMS = 3


@pytest.fixture(scope="module", params=["blip", "florence"])
def loaded(request, tiny_base):
    family = get_family(request.param)
    return family, *family.load(str(tiny_base(request.param)))


def search(loaded, monkeypatch):
    """Return the tokens of two images, how often a layer's cache was reordered, and rows that keys had."""
    family, model, processor = loaded
    moved, rows, reorder = [], [], cache_utils.CacheLayerMixin.reorder_cache
    monkeypatch.setattr(
        cache_utils.CacheLayerMixin,
        "reorder_cache",
        lambda layer, places: moved.append(1) or reorder(layer, places),
    )
    images, prompts = [draw_photo(number) for number in range(2)], [family.facts.default_prompt] * 2
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": BEAMS}
    forward = torch.nn.Linear.forward
    keys = {layer for name, layer in model.named_modules() if name.endswith(PROJECTIONS[family.name])}
    monkeypatch.setattr(
        torch.nn.Linear,
        "forward",
        lambda layer, states: (rows.append(len(states)) if layer in keys else None) or forward(layer, states),
    )
    with torch.inference_mode():
        found = family.generate(model, processor, family.encode(processor, images, prompts), **settings)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in keys)
    return [row.token_ids for row in found], len(moved), set(rows)


def test_beams_find_the_same_captions_with_less_work(loaded, monkeypatch):
    shared, moved, rows = search(loaded, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(beams, "sharing_image", lambda _, settings, *__: nullcontext(settings))
    plain, moved_plainly, rows_plainly = search(loaded, monkeypatch)
    assert shared == plain
    assert 0 < moved == moved_plainly / 2
    assert (rows, rows_plainly) == ({2}, {2 * BEAMS})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3, "use_cache": False},
        {"num_beams": 3, "past_key_values": "given"},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_nothing_is_shared_where_a_search_has_no_beams_no_cache_or_its_own(loaded, settings):
    model = loaded[1]
    with beams.sharing_image(model, settings, model.generation_config, ".*") as given:
        assert given == settings
        assert not any(layer._forward_hooks for layer in model.modules())

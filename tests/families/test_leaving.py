"""Finished rows leave the batch, and nobody sees it in the tokens."""

from contextlib import contextmanager
from copy import deepcopy
from functools import wraps

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor

from caption_train.captioning.sampling import make_sampler
from caption_train.families import FAMILIES, get_family
from caption_train.families.decoding import leaving
from caption_train.families.vlm.processor import VlmProcessor
from tests.fixtures.photos import draw_photo
from tests.fixtures.vlm import KINDS

LENGTHS = (3, 9, 5, 1, 9, 12)
FEWER = [6, 6, 6, 4, 4, 3, 3, 3, 3, 1, 1, 1]
"""How many rows a step has: a quarter must be finished before they leave."""
BASES = [name for name in FAMILIES if name != "vlm"] + [f"vlm/{kind}" for kind in KINDS]


@pytest.fixture(scope="module")
def load(tiny_base):
    def load(name):
        family = get_family(name.partition("/")[0])
        model, processor = family.load(str(tiny_base(name)))
        prompt = family.describe(str(tiny_base(name))).default_prompt
        images = [draw_photo(number, (64, 64)) for number in range(len(LENGTHS))]
        return family, model.eval(), processor, family.encode(processor, images, [prompt] * len(images))

    return load


@pytest.fixture(scope="module")
def blip(load):
    return load("blip")


class EndRows(LogitsProcessor):
    """Ends each row after its number of tokens, and no row before; each row likes tokens of its own."""

    def __init__(self, processor):
        tokenizer = processor.tokenizer
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        self.ends = sorted(processor.chat.stop_ids if isinstance(processor, VlmProcessor) else ends)
        self.start = None

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        scores = scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
        for row, length in enumerate(LENGTHS):
            if input_ids.shape[1] - self.start == length - 1:
                scores[row] = -torch.inf
                scores[row, self.ends] = 0.0
            else:
                scores[row, self.ends] = -torch.inf
        return scores


@contextmanager
def rows_stay(model, settings):
    yield dict(settings)


def caption(loaded, monkeypatch, *, stay=False, processors=None, **settings):
    """Return the tokens of each row, and how many rows the decoder was given in each step."""
    family, model, processor, batch = loaded
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.text_decoder if family.name == "blip" else inner
    counts, forward = [], decoder.forward

    @wraps(forward)
    def count(**keywords):
        ids = keywords["decoder_input_ids" if decoder.config.is_encoder_decoder else "input_ids"]
        counts.append(len(ids))
        return forward(**keywords)

    settings = {"max_new_tokens": 16, "num_beams": 1, "do_sample": False} | settings
    with monkeypatch.context() as patch, torch.inference_mode():
        if stay:
            patch.setattr(leaving, "letting_rows_leave", rows_stay)
        patch.setattr(decoder, "forward", count)
        processors = [EndRows(processor)] if processors is None else processors
        found = family.generate(model, processor, dict(batch), logits_processor=processors, **settings)
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
    return [row.token_ids for row in found], counts


@pytest.mark.parametrize("name", BASES)
def test_finished_rows_are_not_computed_and_all_tokens_stay(name, load, monkeypatch):
    loaded = load(name)
    plain, all_rows = caption(loaded, monkeypatch, stay=True)
    assert [len(row) for row in plain] == list(LENGTHS) and len(set(map(tuple, plain))) == len(LENGTHS)
    tokens, rows = caption(loaded, monkeypatch)
    assert tokens == plain
    # A step of 6 rows reads the prompts; Moondream reads its images before that.
    assert rows[-len(FEWER) :] == FEWER
    assert all_rows == [6] * len(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
        {"min_new_tokens": 4, "eos_token_id": [1, 2, 3, *range(5, 60)], "forced_eos_token_id": 2},
        {"do_sample": True, "top_k": 20},
    ],
)
def test_processors_criteria_and_random_numbers_see_all_rows(settings, load, monkeypatch):
    loaded = load("florence")
    random = torch.random.get_rng_state()
    plain, _ = caption(loaded, monkeypatch, stay=True, **settings)
    torch.random.set_rng_state(random)
    tokens, rows = caption(loaded, monkeypatch, **settings)
    assert tokens == plain
    assert rows[0] == 6 and rows[-1] < 5


def test_a_row_draws_the_same_whatever_other_rows_do(load, monkeypatch):
    loaded = load("moondream")
    names = [f"{row}.png" for row in range(len(LENGTHS))]

    def draw(stay):
        processors = [*make_sampler(names, temperature=1.0, top_p=0.9, seed=0), EndRows(loaded[2])]
        return caption(loaded, monkeypatch, stay=stay, processors=processors)

    plain, _ = draw(stay=True)
    tokens, rows = draw(stay=False)
    assert tokens == plain and rows[-1] == 1


@pytest.mark.parametrize("name", ["blip", "florence", "vlm/qwen3_vl"])
def test_rows_leave_a_model_with_an_adapter_around_it(name, load, monkeypatch):
    family, model, processor, batch = load(name)
    config = LoraConfig(target_modules=["query", "q_proj"], init_lora_weights=False)
    loaded = family, get_peft_model(deepcopy(model), config).eval(), processor, batch
    plain, _ = caption(loaded, monkeypatch, stay=True)
    tokens, rows = caption(loaded, monkeypatch)
    assert tokens == plain and rows == FEWER


def test_rows_leave_where_prompts_have_two_lengths(load, monkeypatch):
    family, model, processor, _ = load("blip")
    images = [draw_photo(number, (64, 64)) for number in range(len(LENGTHS))]
    batch = family.encode(processor, images, ["a photo of"] * 3 + ["a"] * 3)
    loaded = family, model, processor, batch
    settings = {"processors": [], "max_new_tokens": 30}
    (plain, all_rows), (tokens, rows) = (
        caption(loaded, monkeypatch, stay=stay, **settings) for stay in (True, False)
    )
    assert tokens == plain and len(rows) == len(all_rows)


class Asking(EndRows):
    """Asks the model something about all rows, as guidance does."""

    def __init__(self, processor, model):
        super().__init__(processor)
        self.model, self.answers = model, []

    def __call__(self, input_ids, scores):
        self.answers.append(self.model(decoder_input_ids=input_ids, **self.inputs).logits)
        return super().__call__(input_ids, scores)


def test_all_rows_stay_where_the_model_is_asked_something_else(load, monkeypatch):
    loaded = load("florence")
    asking = Asking(loaded[2], loaded[1])
    asking.inputs = loaded[3]
    plain, _ = caption(loaded, monkeypatch, stay=True)
    tokens, rows = caption(loaded, monkeypatch, processors=[asking])
    assert tokens == plain
    assert [len(answer) for answer in asking.answers] == [6] * max(LENGTHS)
    assert rows[::2] == FEWER and set(rows[1::2]) == {6}
    assert all(answer.any() for answer in asking.answers[-1])


STAYING = {
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "no end": {"eos_token_id": None},
    "a static cache": {"cache_implementation": "static"},
    "more results": {"return_dict_in_generate": True},
    "a cache that is given": {"past_key_values": None},
    "candidates": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("settings", STAYING.values(), ids=STAYING)
def test_nothing_is_done_where_rows_must_stay(settings, load):
    model = load("florence")[1]
    settings = {"num_beams": 1} | settings
    with leaving.letting_rows_leave(model, settings) as given:
        assert given == settings
        assert not model._forward_hooks and not model._forward_pre_hooks


def test_rows_stay_in_half_precision_and_with_inputs_that_nobody_knows(load, monkeypatch):
    family, model, processor, batch = load("florence")
    half = deepcopy(model).to(torch.bfloat16)
    halved = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    assert set(caption((family, half, processor, halved), monkeypatch)[1]) == {6}
    with torch.autocast("cpu", torch.bfloat16):
        assert set(caption((family, model, processor, batch), monkeypatch)[1]) == {6}
    monkeypatch.setattr(leaving, "PLACES", {"decoder_input_ids": 0})
    assert set(caption((family, model, processor, batch), monkeypatch)[1]) == {6}

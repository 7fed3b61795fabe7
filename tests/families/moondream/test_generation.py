"""What Moondream 2 answers does not depend on batch, padding, cache or the number of beams beside it."""

import pytest
import torch
from torch.nn import functional as F

from tests.fixtures.moondream import PROMPTS, answer, encode, make_small_model


def test_a_batch_answers_as_each_of_its_rows_alone(loaded, items):
    model, processor = loaded
    together = answer(model, processor, encode(processor, items))
    assert together == [answer(model, processor, encode(processor, [item]))[0] for item in items]


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_every_kind_of_cache_answers_the_same(loaded, items, settings):
    model, processor = loaded
    batch = encode(processor, items)
    assert answer(model, processor, batch, **settings) == answer(model, processor, batch)


def test_padding_on_the_left_answers_the_same(loaded, items):
    model, processor = loaded
    batch = encode(processor, items[1:2])
    padded = {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (3, 0), value=processor.tokenizer.pad_token_id),
        "attention_mask": F.pad(batch["attention_mask"], (3, 0)),
    }
    assert answer(model, processor, padded) == answer(model, processor, batch)


def test_beams_are_those_of_a_single_row(loaded, items):
    model, processor = loaded
    together = answer(model, processor, encode(processor, items), num_beams=3)
    alone = [answer(model, processor, encode(processor, [item]), num_beams=3)[0] for item in items]
    uncached = answer(model, processor, encode(processor, items), num_beams=3, use_cache=False)
    assert together == alone == uncached


def test_sampling_returns_as_many_sequences_as_asked(loaded, items):
    model, processor = loaded
    batch = encode(processor, items)
    torch.manual_seed(0)
    sequences = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=5)
    assert sequences.shape[0] == 2 * len(items)
    assert not torch.equal(sequences[0], sequences[1])


def test_one_image_with_several_prompts_is_encoded_and_decoded_once(loaded, items):
    model, processor = loaded
    image, seen = items[0]["image"], []
    rows = [{"image": image, "prompt": prompt} for prompt in PROMPTS]
    batch = encode(processor, rows)
    assert batch["tilings"].shape == (1, 2) and batch["image_index"].tolist() == [0, 0, 0]
    tower = model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    first = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape[:2]))
    )
    together = answer(model, processor, batch)
    tower.remove(), first.remove()
    assert seen[:2] == [len(batch["pixel_values"]), (1, 10)]
    assert seen[2][0] == 3
    assert together == [answer(model, processor, encode(processor, [row]))[0] for row in rows]


def test_the_answer_token_is_generated_first_or_never(loaded, items):
    model, processor = make_small_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.arange(512) * 0.0)
        model.lm_head.bias[3], model.lm_head.bias[7] = 2.0, 1.0
    assert answer(model, processor, encode(processor, items[:1])) == [[3] + [7] * 11]

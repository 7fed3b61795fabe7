"""What transformers, PEFT and the HF Trainer expect of any model, Moondream 2 does too."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.fixtures.moondream import answer, collate, encode, make_items, make_small_model


@pytest.fixture(scope="module")
def loaded():
    return make_small_model(text={"dim": 256, "n_heads": 4, "n_kv_heads": 2})


@pytest.fixture(scope="module")
def items():
    return make_items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_of_any_precision_load_as_they_were_saved(items, tmp_path, dtype):
    model, processor = make_small_model()
    model.to(dtype).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = AutoModelForImageTextToText.from_pretrained(tmp_path / "shards", device_map="cpu")
    assert shards.dtype == dtype
    assert all(torch.equal(t, shards.state_dict()[name]) for name, t in model.state_dict().items())
    batch = encode(AutoProcessor.from_pretrained(tmp_path), items)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert answer(shards, processor, batch) == answer(whole, processor, batch)


def test_outputs_may_be_a_tuple_and_may_hold_states_and_attentions(loaded, items):
    model, processor = loaded
    batch = encode(processor, items)
    with torch.no_grad():
        named = model(**batch, output_hidden_states=True)
        assert torch.equal(model(**batch, return_dict=False)[0], named.logits)
        model.set_attn_implementation("eager")
        attentions = model(**batch, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    layers = model.config.text_config.num_hidden_layers
    assert len(named.hidden_states) == layers + 1 and len(attentions) == layers
    length = batch["input_ids"].shape[1]
    assert attentions[0].shape == (len(items), 4, length, length)
    assert attentions[0][0, 0, 0, 9] > 0, "BOS does not see the last image token"


def test_the_trainers_count_divides_the_loss(loaded, items):
    model, processor = loaded
    batch = collate(processor, items)
    count = (batch["labels"] != -100).sum()
    with torch.no_grad():
        mean = model(**batch).loss
        torch.testing.assert_close(model(**batch, num_items_in_batch=2 * count).loss, mean / 2)


def test_an_array_is_read_as_the_image_it_is(loaded, items):
    _, processor = loaded
    images = [item["image"] for item in items]
    expected = processor(images, ["normal"] * 3)["pixel_values"]
    assert torch.equal(processor([np.asarray(i) for i in images], ["normal"] * 3)["pixel_values"], expected)
    one = processor(np.asarray(images[1]), "short")
    assert torch.equal(one["pixel_values"], processor(images[1], "short")["pixel_values"])


def test_generation_settings_may_come_as_an_object(loaded, items):
    model, processor = loaded
    batch = encode(processor, items)
    config = type(model.generation_config)(num_beams=3, max_new_tokens=12, eos_token_id=0, pad_token_id=0)
    expected = model.generate(**batch, num_beams=3, max_new_tokens=12)
    assert torch.equal(model.generate(**batch, generation_config=config), expected)


def test_more_rows_than_images_and_several_answers_to_each(loaded, items):
    """Beams and returned answers multiply rows; every one reads the cache of its own image."""
    model, processor = loaded
    pair = [items[0], items[2]]
    rows = [{**item, "prompt": prompt} for item in pair for prompt in ("short", "What is it?")]
    batch = encode(processor, rows)
    settings = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 8}
    together = model.generate(**batch, **settings).view(4, 3, -1)
    for index, row in enumerate(rows):
        alone = encode(processor, [row])
        expected = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        found = together[index, :, batch["input_ids"].shape[1] :][:, : expected.shape[1]]
        assert torch.equal(found, expected)

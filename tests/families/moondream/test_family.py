"""Moondream 2 with random weights: what it reads, what it is trained on, what it answers."""

import pickle

import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch.nn import functional as F

from caption_train.adapters.lora import wrap_with_lora
from caption_train.errors import UsageError
from caption_train.families.moondream.image_processor import cut_fixed_crops
from caption_train.families.moondream.legacy.names import to_legacy
from caption_train.training.monitor.health import copy_lora_b, find_dead_modules
from tests.fixtures.moondream import FAMILY, answer, collate, encode, make_small_model


def test_labels_are_caption_and_end_only(loaded, items):
    _, processor = loaded
    labels = collate(processor, items)["labels"]
    rows = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    assert rows == [f"{item['caption']}<|endoftext|>" for item in items]


def test_a_cut_caption_keeps_its_end(loaded, items):
    _, processor = loaded
    labels = collate(processor, items, max_length=3)["labels"]
    assert (labels != -100).sum(dim=1).tolist()[:2] == [3, 3]
    assert all(row[row != -100][-1] == processor.tokenizer.eos_token_id for row in labels)


def test_training_and_generation_read_the_same_prompt(loaded, items):
    _, processor = loaded
    for item in items:
        trained, asked = collate(processor, [item]), encode(processor, [item])
        length = asked["input_ids"].shape[1]
        assert torch.equal(trained["input_ids"][:, :length], asked["input_ids"])
        assert torch.equal(trained["pixel_values"], asked["pixel_values"])


def test_padding_does_not_change_loss(loaded, items):
    model, processor = loaded
    with torch.no_grad():
        losses = [
            (model(**batch).loss, (batch["labels"] != -100).sum())
            for batch in (collate(processor, [item]) for item in items)
        ]
        together = model(**collate(processor, items)).loss
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(together, mean, atol=1e-5, rtol=0)


def test_the_loss_needs_no_logits_on_image_tokens(loaded, items):
    model, processor = loaded
    batch = collate(processor, items)
    with torch.no_grad():
        short = model(**batch)
        full = model(**{name: value for name, value in batch.items() if name != "logits_to_keep"})
    assert short.logits.shape[1] == full.logits.shape[1] - processor.image_seq_length
    assert short.loss.item() == pytest.approx(full.loss.item(), abs=1e-6)
    expected = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert full.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_an_image_of_one_window_is_encoded_once(loaded):
    _, processor = loaded
    batch = processor([Image.new("RGB", (30, 20)), Image.new("RGB", (60, 60))], ["normal", "short"])
    rows, columns = batch["tilings"][1].tolist()
    assert batch["tilings"][0].tolist() == [1, 1]
    assert len(batch["pixel_values"]) == 1 + 1 + rows * columns


def test_tilings_that_do_not_fit_the_crops_are_refused(loaded, items):
    model, processor = loaded
    batch = encode(processor, items)
    with pytest.raises(ValueError, match="crops, but pixel_values has"):
        model(**{**batch, "tilings": batch["tilings"][:1]})


def test_image_tokens_see_each_other_and_text_does_not_see_ahead(loaded, items):
    model, processor = loaded
    batch = encode(processor, items[:1])
    embeds = model.get_image_features(batch["pixel_values"], batch["tilings"]).detach()
    last = embeds.clone()
    last[:, -1] += 1

    def first_key(image_embeds):
        with torch.no_grad():
            output = model(batch["input_ids"], image_embeds=image_embeds, use_cache=True)
        return output.past_key_values.layers[1].keys[:, :, 0]

    assert not torch.allclose(first_key(embeds), first_key(last))
    with torch.no_grad():
        short = model(batch["input_ids"][:, :-1], image_embeds=embeds).logits[:, -1]
        long = model(batch["input_ids"], image_embeds=embeds).logits[:, -2]
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)


def test_revisions_before_2025_read_the_image_causally(items):
    model, processor = make_small_model(prefix_attention=False)
    batch = encode(processor, items[:1])
    embeds = model.get_image_features(batch["pixel_values"], batch["tilings"]).detach()
    last = embeds.clone()
    last[:, -1] += 1
    keys = [
        model(batch["input_ids"], image_embeds=e, use_cache=True).past_key_values.layers[1].keys[:, :, 0]
        for e in (embeds, last)
    ]
    assert torch.equal(*keys)


def test_a_question_may_need_a_space_and_a_task_may_be_missing(loaded):
    _, processor = make_small_model(question_space=True)
    text = processor.tokenizer.decode(processor.prompt_ids("What is it?"))
    assert text.endswith("query<|md_reserved_1|> What is it?<|md_reserved_2|>")
    processor.templates["caption"]["long"] = None
    with pytest.raises(UsageError, match="--task long"):
        processor.prompt_ids("long")


def test_collators_are_picklable_and_run_in_workers(loaded, items):
    _, processor = loaded
    collator = FAMILY.make_collator(processor, prompt="normal", max_length=64)
    again = pickle.loads(pickle.dumps(collator))(items)
    assert all(torch.equal(again[name], value) for name, value in collator(items).items())


@pytest.mark.parametrize(
    "parts", [["language"], ["vision"], ["projector"], ["vision", "projector", "language"]]
)
def test_every_lora_is_alive_and_in_its_part(items, parts):
    model, processor = make_small_model()
    patterns = [FAMILY.facts.parts[part] for part in parts]
    wrapped = wrap_with_lora(
        model, FAMILY.facts.lora_target_modules, rank=2, alpha=4, dropout=0.0, parts=patterns
    )
    before = copy_lora_b(wrapped)
    batch = collate(processor, items)
    wrapped(**batch).loss.backward()
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0).step()
    assert before and find_dead_modules(wrapped, before) == []
    stems = {"language": "language_model", "vision": "vision_tower", "projector": "multi_modal_projector"}
    assert {stem for stem in stems.values() if any(stem in name for name in before)} == {
        stems[part] for part in parts
    }


def test_lora_on_vision_attention_changes_the_output_and_merges(items):
    model, processor = make_small_model()
    batch = collate(processor, items)
    with torch.no_grad():
        plain = model(**batch).logits
    wrapped = wrap_with_lora(
        model,
        ["self_attn.q_proj", "self_attn.k_proj"],
        rank=2,
        alpha=4,
        dropout=0.0,
        parts=[FAMILY.facts.parts["vision"]],
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        adapted = wrapped(**batch).logits
    assert (adapted - plain).abs().max() > 1e-3
    ids = answer(wrapped, processor, encode(processor, items))
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted, atol=1e-4, rtol=0)
    assert answer(merged, processor, encode(processor, items)) == ids
    assert to_legacy(merged.state_dict(), merged.config).keys() == {
        *to_legacy(make_small_model()[0].state_dict(), model.config)
    }


def test_an_adapter_loads_in_plain_peft_and_transformers(items, tmp_path):
    from transformers import AutoModelForImageTextToText

    model, processor = make_small_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = wrap_with_lora(model, FAMILY.facts.lora_target_modules, rank=2, alpha=4, dropout=0.0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = encode(processor, items)
    assert answer(again, processor, batch) == answer(wrapped.eval(), processor, batch)


def test_gradient_checkpointing_changes_no_gradient(items):
    gradients = []
    for checkpointing in (False, True):
        model, processor = make_small_model()
        wrapped = wrap_with_lora(model, ["q_proj", "fc2"], rank=2, alpha=4, dropout=0.0)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        if checkpointing:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.train()(**collate(processor, items)).loss.backward()
        gradients.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "tiling"),
    [((500, 300), (1, 1)), ((600, 600), (2, 2)), ((1200, 400), (1, 2)), ((400, 1200), (2, 1))],
)
def test_images_before_2025_have_four_sizes(size, tiling):
    image = Image.effect_noise(size, 90).convert("RGB")
    crops, found = cut_fixed_crops(image)
    assert found == tiling and crops.shape == (1 + tiling[0] * tiling[1], 378, 378, 3)
    canvas = torch.from_numpy(
        crops[1:].reshape(*tiling, 378, 378, 3).swapaxes(1, 2).reshape(tiling[0] * 378, tiling[1] * 378, 3)
    ).permute(2, 0, 1)
    reduced = F.interpolate(canvas[None], size=(378, 378), mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(crops[0]), reduced, atol=1e-3, rtol=0)

"""Legacy checkpoints and adapters give the numbers and tokens that Microsoft's own code gave."""

import copy
import hashlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from caption_train.families import get_family
from caption_train.families.florence.legacy.names import native_name
from tests.fixtures.florence_legacy import (
    FIXTURES,
    needs_fixtures,
    read_golden,
    read_tensors,
    set_size,
    write_checkpoint,
)

pytestmark = needs_fixtures
GOLDEN, TENSORS = read_golden() if FIXTURES.is_dir() else ({}, {})
FAMILY = get_family("florence")


def cases(kind):
    return [pytest.param(case, id=case["name"]) for case in GOLDEN.get(kind, [])]


@pytest.fixture(scope="module")
def loaded():
    return FAMILY.load(str(FIXTURES / "checkpoint"))


def read_batch(processor, case):
    set_size(processor, case["size"], case["image_tokens"])
    images = [Image.open(FIXTURES / name).convert("RGB") for name in case["images"]]
    items = [
        {"image": image, "caption": caption, "prompt": prompt}
        for image, caption, prompt in zip(images, case["label_texts"], case["texts"], strict=True)
    ]
    return FAMILY.make_collator(processor, prompt="", max_length=100)(items)


def check_case(model, processor, case):
    """Compare inputs exactly, numbers within the tolerances of FACTS section 1, generated ids exactly."""
    batch = read_batch(processor, case)
    pixels = batch["pixel_values"].numpy().astype("<f4").tobytes()
    assert hashlib.sha256(pixels).hexdigest() == case["pixel_values_sha256_f32le"]
    text = slice(case["image_tokens"], None)
    assert batch["input_ids"][:, text].tolist() == case["input_ids"]
    assert batch["attention_mask"][:, text].tolist() == case["attention_mask"]
    assert batch["labels"].tolist() == case["labels"]
    # The original attends to the padding of a prompt, whatever mask it is given.
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        output = model(**batch)
        features = model.get_image_features(batch["pixel_values"])
    assert output.loss.item() == pytest.approx(case["loss"], abs=5e-5)
    found = {
        "logits": (output.logits, 5e-4),
        "encoder_last_hidden_state": (output.encoder_last_hidden_state, 5e-4),
        "image_features": (features.pooler_output, 3e-3),
        "vision_features": (features.last_hidden_state.flatten(2).mT, 1e-2),
    }
    for name, (tensor, tolerance) in found.items():
        if (golden := TENSORS.get(f"{case['name']}.{name}")) is not None:
            torch.testing.assert_close(tensor, golden, atol=tolerance, rtol=0, msg=name)
    del batch["labels"]
    for name, generated in case["generate"].items():
        results = FAMILY.generate(model, processor, batch, **generated["kwargs"])
        pad = processor.tokenizer.pad_token_id
        assert [result.token_ids for result in results] == [
            [token for token in ids[1:] if token != pad] for ids in generated["ids"]
        ], name
        texts = ["</s>" + processor.tokenizer.decode(result.token_ids) for result in results]
        assert texts == [text.replace("<pad>", "") for text in generated["text"]]


@pytest.mark.parametrize("case", cases("cases"))
def test_the_original_is_reproduced(loaded, case):
    check_case(*loaded, case)


@pytest.mark.parametrize("case", cases("untied_cases"))
def test_a_head_that_drifted_off_is_kept(tmp_path, case):
    head = load_file(FIXTURES / "untied_lm_head.safetensors")
    folder = write_checkpoint(tmp_path / "untied", read_tensors() | head)
    model, processor = FAMILY.load(str(folder))
    text = model.model.language_model
    assert text.shared.weight is text.encoder.embed_tokens.weight is text.decoder.embed_tokens.weight
    check_case(model, processor, case)
    model.save_pretrained(tmp_path / "native")
    processor.save_pretrained(tmp_path / "native")
    check_case(*FAMILY.load(str(tmp_path / "native")), case)


@pytest.mark.parametrize("case", cases("bos_loop_cases"))
def test_the_endless_start_token_ends(loaded, case):
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    for name, tensor in TENSORS.items():
        if name.startswith("bos_loop.language_model."):
            model.get_parameter(native_name(name.removeprefix("bos_loop."))).data.copy_(tensor)
    check_case(model, processor, case)
    ids = GOLDEN["bos_loop_cases"][0]["generate"]["greedy"]["ids"][0]
    assert ids[1:5] != [0, 0, 0, 0]


@pytest.mark.parametrize("case", cases("lora_cases"))
def test_legacy_adapters_act_as_in_the_original(loaded, case):
    from peft import get_peft_model, set_peft_model_state_dict

    from caption_train.families.florence.legacy.export import prepare_merge

    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    config, weights = FAMILY.convert_adapter(FIXTURES / case["name"].partition(".")[0], model)
    adapted = get_peft_model(model, config).eval()
    assert not set_peft_model_state_dict(adapted, weights).unexpected_keys
    check_case(adapted.get_base_model(), processor, case)
    prepare_merge(adapted)
    check_case(adapted.merge_and_unload(), processor, case)


def test_gradients_are_the_originals(loaded):
    golden, processor = GOLDEN["grad_norms_float64"], loaded[1]
    case = next(case for case in GOLDEN["cases"] if case["name"] == golden["case"])
    model = copy.deepcopy(loaded[0]).double()
    batch = read_batch(processor, case)
    batch["pixel_values"] = batch["pixel_values"].double()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-6)
    norms = {name: model.get_parameter(native_name(name)).grad.norm().item() for name in golden["norms"]}
    assert norms == pytest.approx(golden["norms"], rel=1e-5, abs=1e-6)
    assert len(norms) == len(dict(model.named_parameters()))


def test_drop_path_rates_are_the_originals(loaded):
    tower = loaded[0].model.vision_tower
    for place, rates in GOLDEN["drop_path_rates"].items():
        stage, block = map(int, place.split("."))
        found = tower.blocks[stage][block]
        paths = [found.spatial_block.drop_path1, found.channel_block.drop_path1]
        assert [getattr(path, "drop_prob", 0.0) for path in paths] == pytest.approx(rates)


def test_a_padded_batch_is_its_single_runs(loaded):
    """The original's padded batches are not: there the text's padding is attended to."""
    model, processor = loaded
    case = next(case for case in GOLDEN["cases"] if case["name"].endswith("batch_padded"))
    set_size(processor, case["size"], case["image_tokens"])
    images = [Image.open(FIXTURES / name).convert("RGB") for name in case["images"]]
    together = FAMILY.generate(
        model, processor, FAMILY.encode(processor, images, case["texts"]), num_beams=3, max_new_tokens=24
    )
    for image, text, result in zip(images, case["texts"], together, strict=True):
        batch = FAMILY.encode(processor, [image], [text])
        assert FAMILY.generate(model, processor, batch, num_beams=3, max_new_tokens=24) == [result]

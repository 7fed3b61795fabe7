"""Every stage of Moondream 2 gives the official code's numbers, and greedy decoding its tokens."""

import hashlib

import numpy as np
import pytest
import torch

from caption_train.families import get_family
from caption_train.families.moondream.files import END_OF_TEXT
from caption_train.families.moondream.image_processor import cut_crops, normalise, select_tiling
from caption_train.families.moondream.layers import stitch_windows
from caption_train.families.moondream.legacy.names import legacy_names
from tests.fixtures.moondream import (
    CHECKPOINT,
    IMAGES,
    needs_fixtures,
    open_fixture_image,
    read_json,
    read_tensors,
)

pytestmark = needs_fixtures
GOLDEN, SHARED = read_json("tiny_mha/golden.json"), read_json("shared/golden_shared.json")
TENSORS, SHARED_TENSORS = read_tensors("tiny_mha/golden"), read_tensors("shared/golden_shared")
TOLERANCES = read_json("shared/verification.json").get("suggested_tolerances_float32_cpu", {})
FAMILY = get_family("moondream")
LAST_ONLY = ("caption_short", "caption_long", "query_single_suffix")


@pytest.fixture(scope="module")
def loaded():
    return FAMILY.load(str(CHECKPOINT))


@pytest.fixture(scope="module")
def encoded(loaded):
    """Image embeddings by image name, [1, 729, D]."""
    model, processor = loaded
    with torch.no_grad():
        return {
            name: model.get_image_features(
                **processor.image_processor.preprocess(open_fixture_image(name), return_tensors="pt")
            )
            for name in IMAGES
        }


def check(ours, name, tolerance):
    torch.testing.assert_close(ours, TENSORS[name], atol=TOLERANCES[tolerance], rtol=0)


def encode_prompt(processor, prompt):
    return processor.encode_ids([GOLDEN["prompts"][prompt]])["input_ids"]


@pytest.mark.parametrize(("table", "crops"), [("h_w_tilesh_tilesw", 12), ("max_crops_6", 6)])
def test_every_tiling_is_the_official_one(table, crops):
    rows = SHARED[f"tiling_table_{table}"]
    assert len(rows) in (961, 121)
    for height, width, *tiling in rows:
        assert list(select_tiling(height, width, window=266, margin=56, max_crops=crops)) == tiling


@pytest.mark.parametrize("name", IMAGES)
def test_crops_are_the_official_ones_byte_for_byte(name):
    crops, tiling = cut_crops(open_fixture_image(name).convert("RGB"))
    expected = SHARED["images"][name]
    assert list(tiling) == expected["tiling_h_w"]
    assert [hashlib.sha256(crop.tobytes()).hexdigest() for crop in crops] == expected["sha256_pil"]


def test_pixels_are_normalised_in_float32():
    every_level = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1)
    assert np.array_equal(normalise(every_level).ravel(), SHARED_TENSORS["norm_lut.f32"].numpy())


def test_windows_are_stitched_and_pooled_as_officially(loaded):
    stitched = stitch_windows(SHARED_TENSORS["stitch.in"], (2, 3), SHARED["stitch"]["overlap_margin"])
    assert torch.equal(stitched, SHARED_TENSORS["stitch.out"])
    grid = SHARED_TENSORS["pool.in"].permute(2, 0, 1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, 27).permute(1, 2, 0)
    torch.testing.assert_close(pooled, SHARED_TENSORS["pool.out_27x27"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", IMAGES)
def test_vision_stages_are_the_official_ones(loaded, encoded, name):
    model, processor = loaded
    crops, tiling = processor.image_processor.cut(open_fixture_image(name))
    with torch.no_grad():
        features = model.model.vision_tower(torch.from_numpy(normalise(crops))).last_hidden_state
        check(features[:, ::13], f"{name}.vision_out.tokens_every_13", "vision_out")
        grid = stitch_windows(features[1:].unflatten(1, (27, 27)), tiling, 4)
        check(grid[::5, ::5], f"{name}.reconstructed.every_5x5", "vision_out")
        pooled = model.model.pool_windows(features[1:], tiling)
    assert pooled.abs().sum().item() == pytest.approx(
        GOLDEN["images"][name]["stats"]["pooled"]["abs_sum"], rel=1e-5
    )
    if f"{name}.pooled" in TENSORS:
        check(pooled, f"{name}.pooled", "vision_out")
        check(encoded[name][0], f"{name}.img_emb", "img_emb")
    check(encoded[name][0, ::13], f"{name}.img_emb.tokens_every_13", "img_emb")


def test_first_vision_layers_are_the_official_ones(loaded):
    model, processor = loaded
    crops, _ = processor.image_processor.cut(open_fixture_image("gray_200x120"))
    tower = model.model.vision_tower
    with torch.no_grad():
        embedded = tower.embeddings(torch.from_numpy(normalise(crops[:1])))
        first = tower.encoder.layers[0](embedded, None)
    check(embedded[0, ::13], "gray_200x120.vision_embed_plus_pos.crop0", "vision_out")
    check(first[0, ::13], "gray_200x120.vision_after_block0.crop0", "vision_out")


@pytest.mark.parametrize("name", IMAGES)
def test_logits_are_the_official_ones(loaded, encoded, name):
    model, processor = loaded
    for prompt in GOLDEN["prompts"]:
        with torch.no_grad():
            logits = model(input_ids=encode_prompt(processor, prompt), image_embeds=encoded[name]).logits[0]
        if prompt in LAST_ONLY:
            check(logits[-1], f"{name}.{prompt}.last_logits", "logits")
        else:
            check(logits[730:], f"{name}.{prompt}.logits", "logits")


def test_hidden_states_and_cached_keys_are_the_official_ones(loaded, encoded):
    model, processor = loaded
    layers, hidden = model.model.language_model.layers, []
    hooks = [layers[0].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))]
    hooks += [
        layer.register_forward_hook(lambda module, args, output: hidden.append(output)) for layer in layers
    ]
    with torch.no_grad():
        output = model(
            input_ids=encode_prompt(processor, "caption_normal"),
            image_embeds=encoded["wide_900x450"],
            use_cache=True,
        )
    for hook in hooks:
        hook.remove()
    for blocks, states in enumerate(hidden):
        check(states[0, GOLDEN["hidden_positions"]], f"wide_900x450.hidden_after_{blocks}_blocks", "hidden")
    keys = output.past_key_values.layers[0].keys[0][:, [0, 1, 365, 729]]
    interleaved = torch.stack([keys[..., :16], keys[..., 16:32]], dim=-1).flatten(-2)
    official = torch.cat([interleaved, keys[..., 32:]], dim=-1)
    check(official, "wide_900x450.kcache_block0_pos_0_1_365_729_official_layout", "hidden")


@pytest.mark.parametrize("prompt", GOLDEN.get("prompts", {}))
def test_greedy_tokens_are_the_official_ones(loaded, encoded, prompt):
    model, processor = loaded
    for name in IMAGES:
        expected = GOLDEN["images"][name]["greedy"][prompt]
        ids = encode_prompt(processor, prompt)
        ours = model.generate(ids, image_embeds=encoded[name], max_new_tokens=20)[0, ids.shape[1] :].tolist()
        assert ours == expected["ids"] + [0] * expected["stopped_on_eos"]


@pytest.mark.parametrize("name", ["wide_900x450", "gray_200x120"])
@pytest.mark.parametrize("prompt", ["caption_normal_template", "finetune_script_string"])
def test_losses_are_the_official_ones(loaded, encoded, name, prompt):
    model, processor = loaded
    question, answer = GOLDEN["train_prompts"][prompt], GOLDEN["answer_ids"]
    batch = processor.encode_ids([question], [answer])
    labels = batch["input_ids"].clone()
    labels[:, : -len(answer)] = -100
    with torch.no_grad():
        output = model(**batch, image_embeds=encoded[name], labels=labels)
    assert output.loss.item() == pytest.approx(
        GOLDEN["images"][name]["train"][prompt]["loss"], abs=TOLERANCES["loss"]
    )
    logits = output.logits[0, -len(answer) - 1 : -1]
    check(logits, f"{name}.train.{prompt}.answer_logits", "logits")
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
    check(losses, f"{name}.train.{prompt}.nll", "nll")


def test_the_collator_trains_on_the_official_loss_and_gradients(loaded):
    model, processor = loaded
    caption = GOLDEN["answer_text"].removesuffix("<|endoftext|>")
    item = {"image": open_fixture_image("wide_900x450"), "caption": caption}
    batch = FAMILY.make_collator(processor, prompt="normal", max_length=256)([item])
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["grad"]["loss"], abs=TOLERANCES["loss"])
    parameters, names = dict(model.named_parameters()), legacy_names(model.config)
    for name, norm in GOLDEN["grad"]["norms"].items():
        gradient = torch.cat([parameters[ours].grad for ours in names[name]])
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name
        if f"grad.{name}.first_16x16" in TENSORS:
            check(gradient.flatten(1)[:16, :16], f"grad.{name}.first_16x16", "grad_slices")
    for name in GOLDEN["grad"]["no_grad"]:
        assert all(parameters[ours].grad is None for ours in names[name])
    model.zero_grad()


def test_prompts_and_captions_have_the_official_ids(loaded):
    _, processor = loaded
    for task in ("short", "normal", "long"):
        assert processor.prompt_ids(task) == GOLDEN["prompts"][f"caption_{task}"]
    assert processor.prompt_ids(GOLDEN["question"]) == GOLDEN["prompts"]["query_single_suffix"]
    # The official answer has the end token spelled out; here a text cannot become one, and it is appended.
    answer = GOLDEN["answer_text"].removesuffix(END_OF_TEXT)
    assert [*processor.text_ids(answer), processor.tokenizer.eos_token_id] == GOLDEN["answer_ids"]

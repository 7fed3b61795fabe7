"""Legacy adapters of every kind act on the native model as their tensors say, or are refused by name."""

import copy

import pytest
import torch

from caption_train.adapters.load import find_shared, load_adapter
from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.families.florence.legacy.adapter import (
    Adapter,
    read_adapter_files,
    rename_adapter,
    restore_adapter,
)
from caption_train.families.florence.legacy.export import prepare_merge
from caption_train.families.florence.legacy.names import native_name
from tests.fixtures.florence_legacy import (
    FIXTURES,
    TIED,
    LegacyLora,
    needs_fixtures,
    read_tensors,
    write_checkpoint,
)

pytestmark = needs_fixtures
FAMILY = get_family("florence")
SEED_TARGETS = r".*\.(qkv|proj|k_proj|v_proj|q_proj|out_proj)"


@pytest.fixture(scope="module")
def tensors():
    return read_tensors()


@pytest.fixture(scope="module")
def base():
    return FAMILY.load(str(FIXTURES / "checkpoint"))[0]


def run(model):
    """Logits and image features of a fixed input."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[775] * 37 + [0, 315, 455, 267, 2]])
    pixels = torch.randn(1, 3, 192, 192, generator=generator)
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, labels=torch.tensor([[0, 68, 431, 2]]))
    return output.logits


def check(tmp_path, tensors, base, lora, suffix="safetensors"):
    """The adapted model, and the merged one, equal the checkpoint whose tensors were merged by hand."""
    model = copy.deepcopy(base)
    adapted = load_adapter(model, lora.write(tmp_path / "lora", suffix), FAMILY)
    folder = write_checkpoint(tmp_path / "merged", tensors | lora.merged)
    expected = run(FAMILY.load(str(folder))[0])
    assert (run(base) - expected).abs().max() > 0.01
    torch.testing.assert_close(run(adapted), expected, atol=2e-4, rtol=0)
    prepare_merge(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, atol=2e-4, rtol=0)
    merged.save_pretrained(tmp_path / "saved")
    again = type(merged).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(run(again), run(merged), atol=0, rtol=0)
    return adapted


def test_the_reference_targets_with_convolutions(tmp_path, tensors, base):
    lora = LegacyLora(tensors, SEED_TARGETS)
    assert len(lora.merged) == 48
    assert "vision_tower.convs.0.proj.weight" in lora.merged
    check(tmp_path, tensors, base, lora)


def test_rslora_with_patterns_in_a_bin_file(tmp_path, tensors, base):
    lora = LegacyLora(
        tensors,
        SEED_TARGETS,
        rank=lambda module: 8 if "decoder" in module and module.endswith("q_proj") else 4,
        use_rslora=True,
        rank_pattern={r"language_model\.model\.decoder.*\.q_proj": 8},
        alpha_pattern={"qkv": 2, r"convs\.\d\.proj": 16},
    )
    check(tmp_path, tensors, base, lora, "bin")


def test_lora_of_the_head_leaves_the_embedding_alone(tmp_path, tensors, base):
    adapted = check(tmp_path, tensors, base, LegacyLora(tensors, r".*(lm_head|fc1|fc2)"))
    assert not adapted.get_base_model().config.tie_word_embeddings


def test_dora(tmp_path, tensors, base):
    check(tmp_path, tensors, base, LegacyLora(tensors, SEED_TARGETS, dora=True))


def test_a_task_type_of_language_models_does_not_lose_the_image(tmp_path, tensors, base):
    check(tmp_path, tensors, base, LegacyLora(tensors, r".*fc[12]", task_type="SEQ_2_SEQ_LM"))


def test_a_saved_embedding_is_the_decoders_alone(tmp_path, tensors, base):
    """The encoder is given embeddings of `shared`; its own table is never read, in either layout."""
    lora = LegacyLora(tensors, r".*q_proj", modules_to_save=["embed_tokens"])
    for name in TIED[1:3]:
        lora.tensors[name] = tensors[name] + 0.3
    adapted = load_adapter(copy.deepcopy(base), lora.write(tmp_path / "lora"), FAMILY)
    model = FAMILY.load(str(write_checkpoint(tmp_path / "merged", tensors | lora.merged)))[0]
    decoder = model.model.language_model.decoder
    decoder.embed_tokens = copy.deepcopy(decoder.embed_tokens)
    decoder.embed_tokens.weight.data += 0.3
    torch.testing.assert_close(run(adapted), run(model), atol=2e-4, rtol=0)


def test_modules_to_save(tmp_path, tensors, base):
    lora = LegacyLora(
        tensors, r".*\.q_proj", modules_to_save=["lm_head", "image_proj_norm", "image_pos_embed"]
    )
    for name in list(tensors):
        if name.startswith(("language_model.lm_head", "image_proj_norm", "image_pos_embed")):
            lora.tensors[name] = lora.merged[name] = tensors[name] * 1.5 + 0.1
    check(tmp_path, tensors, base, lora)


def test_the_bases_own_embeddings_saved_along_are_dropped(tmp_path, tensors, base):
    lora = LegacyLora(tensors, r".*lm_head")
    lora.tensors["language_model.lm_head.base_layer.weight"] = tensors[TIED[3]]
    lora.tensors["language_model.model.shared.weight"] = tensors[TIED[0]].half()
    tensors = tensors | {name: tensors[name].half().float() for name in TIED}
    lora.tensors["language_model.lm_head.base_layer.weight"] = tensors[TIED[3]]
    model, _ = FAMILY.load(str(write_checkpoint(tmp_path / "half", tensors)))
    load_adapter(model, lora.write(tmp_path / "lora"), FAMILY)
    lora.tensors["language_model.model.shared.weight"] += 1
    with pytest.raises(CaptionTrainError, match="nor the base's own"):
        load_adapter(copy.deepcopy(base), lora.write(tmp_path / "other"), FAMILY)


def test_a_base_with_more_rows_takes_a_head_of_less(tmp_path, tensors, base):
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(1856, mean_resizing=False)
    lora = LegacyLora(tensors, r".*lm_head")
    expected = run(load_adapter(copy.deepcopy(base), lora.write(tmp_path / "lora"), FAMILY))
    found = run(load_adapter(grown, tmp_path / "lora", FAMILY))
    torch.testing.assert_close(found[..., :1801], expected, atol=1e-5, rtol=0)
    lora.tensors = {name: torch.cat([tensor] * 2) for name, tensor in lora.tensors.items()}
    with pytest.raises(CaptionTrainError, match="the base only 1801"):
        load_adapter(copy.deepcopy(base), lora.write(tmp_path / "large"), FAMILY)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vision_tower.blocks.7.0.spatial_block.window_attn.fn.qkv.lora_A.weight", {}, r"no .*blocks\.7"),
        ("vision_tower.neck.lora_A.weight", {}, r"no counterpart: vision_tower\.neck"),
        ("image_proj_norm.weight", {}, r"image_proj_norm\.weight is neither LoRA"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        (None, {"peft_type": "IA3"}, "IA3 adapters cannot be converted"),
        (None, {"target_parameters": ["image_projection"]}, "target_parameters"),
        (None, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ("language_model.final_logits_bias", {}, "final_logits_bias is not zero"),
    ],
)
def test_what_has_no_place_is_named(tmp_path, tensors, base, name, config, message):
    lora = LegacyLora(tensors, r".*\.q_proj", **config)
    if name:
        lora.tensors[name] = torch.ones(4, 8)
    with pytest.raises(CaptionTrainError, match=message) as caught:
        load_adapter(base, lora.write(tmp_path / "lora"), FAMILY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named_by", ["base_layer", "module"])
@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_biases_that_were_trained_along(tmp_path, tensors, base, kind, named_by):
    lora = LegacyLora(tensors, r".*\.(q_proj|fc1)", bias=kind)
    for name in [name for name in tensors if name.endswith(".bias")]:
        target = f"{name.removesuffix('.bias')}.weight" in lora.merged
        if target or kind == "all":
            lora.merged[name] = tensors[name] + 0.05
            place = name.replace(".bias", ".base_layer.bias") if target and named_by == "base_layer" else name
            lora.tensors[place] = lora.merged[name]
    lora.tensors["language_model.final_logits_bias"] = torch.zeros(1, 1801)
    check(tmp_path, tensors, base, lora)


def test_biases_that_the_file_lacks_are_the_bases(tmp_path, tensors, base):
    """PEFT saves none of a `lora_only`."""
    check(tmp_path, tensors, base, LegacyLora(tensors, r".*\.(q_proj|fc1)", bias="lora_only"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save({"x": Evil()}, path), "damaged, or holds other things than tensors"),
        (lambda path: torch.save([1], path), "damaged, or holds other things than tensors"),
        (lambda path: torch.save({"step": 1}, path), "other things than tensors: step"),
        (lambda path: path.write_bytes(b"PK"), "damaged"),
        (lambda path: path.unlink(), "no weights: none of adapter_model.safetensors"),
        (
            lambda path: torch.save({"vision_tower.x": torch.ones(1)}, path),
            "no LoRA of any module .* vision_tower",
        ),
        (
            lambda path: (path.parent / "adapter_config.json").write_text("{"),
            r"adapter_config\.json: cannot be read: broken JSON",
        ),
    ],
)
def test_a_broken_adapter_is_one_line(tmp_path, tensors, base, write, message):
    write(LegacyLora(tensors, r".*q_proj").write(tmp_path / "lora", "bin") / "adapter_model.bin")
    with pytest.raises(CaptionTrainError, match=message) as caught:
        load_adapter(base, tmp_path / "lora", FAMILY)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_native_adapter_is_left_as_it_is(tmp_path, base):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "native")
    assert FAMILY.convert_adapter(tmp_path / "native", base) is None


@pytest.mark.parametrize("name", ["lora_attention", "lora_roboflow_style"])
def test_native_and_back_is_the_same_adapter(name):
    adapter = read_adapter_files(FIXTURES / name)
    again = restore_adapter(rename_adapter(adapter, native_name))
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())
    assert set(again.config["target_modules"]) == set(adapter.ranks())
    kept = ("r", "lora_alpha", "use_rslora", "bias", "task_type", "base_model_name_or_path", "peft_type")
    assert {key: again.config.get(key) for key in kept} == {key: adapter.config[key] for key in kept}


@pytest.mark.parametrize(("start", "expected"), [("corda", True), ("gaussian", "gaussian"), (False, False)])
def test_a_way_to_start_that_old_tools_do_not_know_is_left_out(start, expected):
    adapter = rename_adapter(read_adapter_files(FIXTURES / "lora_attention"), native_name)
    adapter.config["init_lora_weights"] = start
    assert restore_adapter(adapter).config["init_lora_weights"] == expected


def test_an_embedding_adapter_is_not_merged(base):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["shared"]))
    prepare_merge(adapted)
    assert find_shared(adapted) == ["model.language_model.shared"]


def test_ranks_come_from_the_tensors():
    tensors = {"a.lora_A.weight": torch.ones(3, 5), "b.lora_embedding_A": torch.ones(2, 9)}
    assert Adapter({}, tensors).ranks() == {"a": 3, "b": 2}

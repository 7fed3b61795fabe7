"""Official folders of every layout load completely, or are refused with the names of what does not fit."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.families.moondream.config import MoondreamConfig, legacy_dict, native_dict
from caption_train.families.moondream.legacy.checkpoint import read_legacy, write_legacy
from caption_train.families.moondream.legacy.names import name_of_2024, to_legacy, to_native
from tests.fixtures.moondream import (
    CHECKPOINT,
    make_small_model,
    needs_fixtures,
    read_json,
    read_tensors,
    write_folder,
)

FAMILY = get_family("moondream")
SMALL = {
    "text": {"dim": 256, "n_heads": 4, "n_kv_heads": 2},
    "vision": {"enc_dim": 24, "enc_n_heads": 2, "enc_n_layers": 2},
}


def to_names_of_2024(tensors):
    """The fixture in the layout of 2024, whose Fourier matrices are transposed."""
    renamed = {name_of_2024(name.removeprefix("model.")): tensor for name, tensor in tensors.items()}
    features = ("region_model.coordinate_features.weight", "region_model.size_features.weight")
    return {name: t.T if name in features else t for name, t in renamed.items()}


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@needs_fixtures
def test_an_official_folder_survives_loading_and_saving_bit_for_bit(tmp_path):
    model, processor = FAMILY.load(str(CHECKPOINT))
    write_legacy(tmp_path, model.config, model.state_dict(), processor.tokenizer)
    ours, official = read_tensors_of(tmp_path), read_tensors()
    assert ours.keys() == official.keys()
    assert all(torch.equal(ours[name], official[name]) for name in official)
    nested, official_config = (
        json.loads((tmp_path / "config.json").read_text())["config"],
        read_json("tiny_mha/config.json")["config"],
    )
    for part in official_config:
        assert {k: v for k, v in official_config[part].items() if v is not None} == nested[part]
    assert same_state(model, FAMILY.load(str(tmp_path))[0])


def read_tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@needs_fixtures
@pytest.mark.parametrize("change", ["old", "plain", "sharded", "compiled", "with_caches"])
def test_every_layout_gives_the_same_model(tmp_path, change):
    tensors, shards = read_tensors(), 1
    if change == "old":
        tensors = to_names_of_2024(tensors)
    elif change == "plain":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    elif change == "sharded":
        shards = 3
    elif change == "compiled":
        tensors = {f"model._orig_mod.{name.removeprefix('model.')}": t for name, t in tensors.items()}
    else:
        tensors["model.text.blocks.0.kv_cache.k_cache"] = torch.zeros(1)
    folder = write_folder(tmp_path, tensors, read_json("tiny_mha/config.json"), shards)
    expected, _ = FAMILY.load(str(CHECKPOINT))
    assert same_state(FAMILY.load(str(folder))[0], expected)


def test_fewer_kv_heads_than_heads_are_split_by_their_sizes():
    config = MoondreamConfig(**native_dict({"config": SMALL}))
    rows = torch.arange((4 + 2 + 2) * 64.0)[:, None].expand(-1, 256)
    state = to_native({**make_official(config), "text.blocks.0.attn.qkv.weight": rows}, config)
    parts = [state[f"model.language_model.layers.0.self_attn.{n}_proj.weight"][:, 0] for n in "qkv"]
    assert [len(part) for part in parts] == [256, 128, 128]
    assert torch.equal(torch.cat(parts), rows[:, 0])


def make_official(config):
    """Zeros for every tensor of the official layout, without `model.`."""
    from caption_train.families.moondream.model import MoondreamForConditionalGeneration

    state = MoondreamForConditionalGeneration(config).state_dict()
    return {name.removeprefix("model."): tensor for name, tensor in to_legacy(state, config).items()}


@needs_fixtures
@pytest.mark.parametrize("size", ["moondream2_2b_default", "moondream_0_5b_config_md05_with_n_kv_heads_16"])
def test_names_and_shapes_of_the_released_sizes_are_all_there(size):
    from caption_train.families.moondream.model import MoondreamForConditionalGeneration

    released = read_json("shared/real_state_dict_keys.json")[size]
    small = {"dim": 1024, "ff_dim": 4096, "n_layers": 24, "vocab_size": 51200, "n_heads": 16}
    vision = {"enc_dim": 720, "enc_n_layers": 27, "enc_ff_dim": 2690, "enc_n_heads": 10, "proj_out_dim": 1024}
    nested = {} if "2b" in size else {"text": small, "vision": vision, "region": {"dim": 1024}}
    inner = released["keys"]["model.vision.proj_mlp.fc1.weight"][0]
    if nested:
        nested["vision"]["proj_inner_dim"] = inner
        nested["region"] |= {"inner_dim": released["keys"]["model.region.coord_decoder.fc1.weight"][0]}
    with torch.device("meta"):
        model = MoondreamForConditionalGeneration(MoondreamConfig(**native_dict({"config": nested})))
    tensors = to_legacy(model.state_dict(), model.config)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == released["keys"]
    assert sum(p.numel() for p in model.parameters()) == released["n_params"]


def test_an_empty_nested_config_means_the_2b_model():
    config = MoondreamConfig.from_dict({"model_type": "moondream1", "config": {}})
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (2048, 24, 32)
    assert (vision.hidden_size, vision.num_attention_heads, vision.layer_norm_eps) == (1152, 16, 1e-5)
    assert config.bos_token_id == 0 and config.templates["caption"]["normal"] == [1, 32708, 2, 6382, 3]


def test_dimensions_that_an_empty_config_leaves_out_are_read_from_the_weights(tmp_path):
    text, vision = {**SMALL["text"]}, {"enc_dim": 72, "enc_n_heads": 1, "enc_ff_dim": 40, "enc_n_layers": 2}
    config = MoondreamConfig(**native_dict({"config": {"text": text | {"n_layers": 1}, "vision": vision}}))
    tensors = {f"model.{name}": tensor for name, tensor in make_official(config).items()}
    folder = tmp_path / "empty"
    folder.mkdir()
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "moondream1", "config": {}}))
    found, _ = read_legacy(folder)
    assert (found.text_config.num_attention_heads, found.text_config.num_key_value_heads) == (4, 2)
    assert (found.vision_config.hidden_size, found.vision_config.num_attention_heads) == (72, 1)
    assert found.vision_config.num_hidden_layers == 2


@needs_fixtures
def test_a_missing_or_unknown_tensor_is_named(tmp_path):
    tensors = read_tensors()
    config = read_json("tiny_mha/config.json")
    del tensors["model.text.post_ln.bias"]
    with pytest.raises(CaptionTrainError, match=r"not in the checkpoint: text\.post_ln\.bias"):
        FAMILY.load(str(write_folder(tmp_path / "less", tensors, config)))
    tensors = {**read_tensors(), "model.vision.extra": torch.zeros(1)}
    with pytest.raises(CaptionTrainError, match=r"no place: vision\.extra"):
        FAMILY.load(str(write_folder(tmp_path / "more", tensors, config)))


@needs_fixtures
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path):
    config = read_json("tiny_mha/config.json")
    config["config"]["text"]["n_layers"] = 3
    with pytest.raises(CaptionTrainError, match=r"text.n_layers = 3, the weights have 2"):
        FAMILY.load(str(write_folder(tmp_path, read_tensors(), config)))


@needs_fixtures
def test_the_wrong_tokenizer_is_refused_by_name(tmp_path):
    config = read_json("tiny_mha/config.json")
    config["config"]["tokenizer"]["bos_id"] = 50256
    folder = write_folder(tmp_path, read_tensors(), config)
    with pytest.raises(UsageError, match=r"starmie-v1 \(<\|endoftext\|> = 0\).*CodeGen"):
        FAMILY.load(str(folder))


@needs_fixtures
@pytest.mark.parametrize("release", ["2025-04-14", "2024-08-26"])
def test_revision_says_what_a_folder_does_not(tmp_path, release):
    config = read_json("tiny_mha/config.json")
    del config["config"]["tokenizer"]
    folder = write_folder(tmp_path, read_tensors(), config)
    found, _ = read_legacy(folder, revision=release)
    assert found.bos_token_id == 50256
    assert found.templates["query"]["suffix"] == [198, 198, 33706, 25]
    assert found.prefix_attention == (found.crops == "overlap") == (release != "2024-08-26")
    with pytest.raises(UsageError, match="CodeGen"):
        FAMILY.load(str(folder), revision=release)
    with pytest.raises(UsageError, match=r"--revision 2025: the releases .* are 2024-08-26, 2025-01-09"):
        FAMILY.load(str(folder), revision="2025")


@needs_fixtures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_rounded_weights(dtype):
    model, _ = FAMILY.load(str(CHECKPOINT), dtype=dtype)
    full = read_tensors()["model.text.wte"]
    assert torch.equal(model.get_input_embeddings().weight, full.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_save_pretrained_keeps_model_processor_and_generation(tmp_path):
    model, processor = make_small_model(overlap_margin=1, question_space=True)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = FAMILY.load(str(tmp_path))
    assert same_state(model, again)
    assert legacy_dict(again.config) == legacy_dict(model.config)
    assert again.generation_config.max_new_tokens == 7
    for name in ("templates", "question_space", "image_token_id", "image_seq_length"):
        assert getattr(processor_again, name) == getattr(processor, name)
    assert processor_again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert processor_again.prompt_ids("What is it?") == processor.prompt_ids("What is it?")


def test_auto_classes_load_our_layout(tmp_path):
    model, processor = make_small_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert same_state(AutoModelForImageTextToText.from_pretrained(tmp_path), model)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)


@needs_fixtures
def test_auto_classes_load_the_official_layout():
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert config.templates == read_json("tiny_mha/config.json")["config"]["tokenizer"]["templates"]
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    assert same_state(model, FAMILY.load(str(CHECKPOINT))[0])


def test_region_heads_are_carried_but_never_trained(tmp_path):
    made, processor = make_small_model()
    write_legacy(tmp_path, made.config, made.state_dict(), processor.tokenizer)
    model, _ = FAMILY.load(str(tmp_path))
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
    region = dict(model.model.region.named_parameters())
    assert len(region) == 14 and not any(p.requires_grad for p in region.values())
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert not any("region" in name for name in linears)


def test_a_checkpoint_without_region_heads_stays_without():
    model, _ = make_small_model(region=None)
    assert not any("region" in name for name in to_legacy(model.state_dict(), model.config))


def test_official_config_round_trips():
    config = make_small_model()[0].config
    again = MoondreamConfig.from_dict(copy.deepcopy(legacy_dict(config)))
    assert legacy_dict(again) == legacy_dict(config)


def test_a_quantized_model_loads_from_the_official_layout_and_is_not_written_to_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    from caption_train.adapters.quantization import make_quantization_config
    from caption_train.config.training import TrainOptions

    model, processor = make_small_model(text={"ff_dim": 256})
    write_legacy(tmp_path, model.config, model.state_dict(), processor.tokenizer)
    config = make_quantization_config(TrainOptions(quantize="4bit"))
    quantized, _ = FAMILY.load(str(tmp_path), quantization_config=config)
    kinds = {type(module).__name__ for module in quantized.model.language_model.modules()}
    assert "Linear4bit" in kinds and "Linear" not in kinds
    assert torch.equal(quantized.model.region.coord_features, model.model.region.coord_features)
    with pytest.raises(CaptionTrainError, match="no quantized weights"):
        write_legacy(tmp_path / "out", quantized.config, quantized.state_dict())


def test_an_exported_model_says_its_precision(tmp_path):
    model, processor = make_small_model()
    FAMILY.save_legacy(model.to(torch.bfloat16), processor, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert FAMILY.find_stored_dtype(str(tmp_path)) == torch.bfloat16

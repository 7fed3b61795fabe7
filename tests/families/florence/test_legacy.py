"""Legacy checkpoints of every layout load completely, or are refused with the names of what does not fit."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.families.florence.files import find_checkpoint
from caption_train.families.florence.legacy.load import convert_tensors
from caption_train.families.florence.legacy.names import PAIRS, legacy_name, native_name
from tests.fixtures.florence_legacy import (
    FIXTURES,
    TIED,
    needs_fixtures,
    read_config,
    read_tensors,
    write_checkpoint,
)

pytestmark = needs_fixtures
FAMILY = get_family("florence")
SUBSETS = [names for count in range(1, 5) for names in itertools.combinations(TIED, count)]


@pytest.fixture(scope="module")
def tensors():
    return read_tensors()


@pytest.fixture(scope="module")
def state(tensors):
    return convert_tensors(tensors)[0]


def check_weights(model, state, dtype=torch.float32):
    """Every parameter and buffer of the model is the checkpoint's, bit for bit."""
    loaded = model.state_dict()
    shared = "model.language_model.shared.weight"
    for name, tensor in loaded.items():
        source = state.get(name, state[shared])
        assert tensor.dtype == dtype
        assert torch.equal(tensor, source.to(dtype)), name
    assert state.keys() <= loaded.keys()


@pytest.mark.parametrize(
    ("layout", "shards", "config"),
    [
        ("bin", 1, "checkpoint"),
        ("bin", 3, "checkpoint_safetensors"),
        ("safetensors", 1, "checkpoint"),
        ("safetensors", 4, "checkpoint_safetensors"),
    ],
)
def test_every_layout_loads_every_tensor(tmp_path, tensors, state, layout, shards, config):
    folder = write_checkpoint(
        tmp_path / "model", tensors, config=read_config(config), layout=layout, shards=shards
    )
    model, processor = FAMILY.load(str(folder))
    check_weights(model, state)
    assert not model.training
    assert model.name_or_path == str(folder)
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == 1801


def test_captions_are_counted_without_the_weights(tmp_path, tensors):
    folder = write_checkpoint(tmp_path / "model", tensors)
    _, loaded = FAMILY.load(str(folder))
    (folder / "pytorch_model.bin").unlink()
    processor = FAMILY.load_text_processor(str(folder))
    for caption in ("a red square, small", "a cat</s> <loc_12>"):
        assert FAMILY.tokenize_caption(processor, caption) == FAMILY.tokenize_caption(loaded, caption)
    assert processor.tokenizer.model_max_length == loaded.tokenizer.model_max_length
    assert FAMILY.control_ids(processor) == FAMILY.control_ids(loaded)


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: "+".join(name.split(".")[-2] for name in names))
def test_any_subset_of_the_tied_names_is_enough(tensors, state, names):
    kept = {name: tensor for name, tensor in tensors.items() if name not in TIED or name in names}
    converted, tied = convert_tensors(kept)
    assert tied
    assert converted.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in converted.items())


def test_only_the_encoders_embedding_and_another_head(tensors):
    head = load_file(FIXTURES / "untied_lm_head.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in TIED}
    converted, tied = convert_tensors(kept | head | {TIED[1]: tensors[TIED[1]]})
    assert not tied
    assert torch.equal(converted["lm_head.weight"], head[TIED[3]])
    assert torch.equal(converted["model.language_model.shared.weight"], tensors[TIED[0]])


def test_other_position_tables_vocabularies_and_types(tmp_path, tensors, state):
    """Sizes come from the tensors; the text model may be called anything, the checkpoint may be float16."""
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    for part in ("encoder", "decoder"):
        name = f"language_model.model.{part}.embed_positions.weight"
        tensors[name] = torch.randn(4098, 64, dtype=torch.float16)
    tensors |= {name: torch.cat([tensors[name], torch.ones(7, 64).half()]) for name in TIED}
    tensors["language_model.final_logits_bias"] = torch.zeros(1, 1808)
    config = read_config() | {"torch_dtype": "float16"}
    config["text_config"].pop("vocab_size")
    folder = write_checkpoint(tmp_path / "model", tensors, config=config, layout="safetensors")
    for dtype in (None, torch.bfloat16):
        model, _ = FAMILY.load(str(folder), dtype=dtype)
        check_weights(model, convert_tensors(tensors)[0], dtype or torch.float32)
    assert model.config.text_config.max_position_embeddings == 4096
    assert model.config.text_config.vocab_size == 1808


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_tower.convs.4.proj.weight": (3, 3)}, r"left over: vision_tower\.convs\.4\.proj\.weight"),
        ({"vision_tower.head.weight": (3, 3)}, r"no part of Florence-2: vision_tower\.head\.weight"),
        ({"language_model.model.encoder.layers.2.fc1.bias": (3,)}, r"left over: .*layers\.2\.fc1\.bias"),
        ({"image_proj_norm.bias": None}, r"1 tensors are missing: image_proj_norm\.bias"),
        ({"image_projection": None}, r"missing: image_projection"),
        (
            {"image_projection": (64, 96)},
            r"another shape .* image_projection \(96, 64\) instead of \(64, 96\)",
        ),
        ({"language_model.model.shared.weight": (1801, 64)}, "differ, but are one embedding"),
        ({"language_model.final_logits_bias": (1, 1801)}, "final_logits_bias is not zero"),
        (dict.fromkeys(TIED), "no embedding"),
        ({"image_pos_embed.row_embeddings.weight": None}, "no tensor image_pos_embed"),
    ],
)
def test_a_tensor_over_missing_or_wrong_is_named(tmp_path, tensors, change, message):
    tensors = dict(tensors)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = torch.ones(shape)
    folder = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(CaptionTrainError, match=message) as caught:
        FAMILY.load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("image_feature_source", ["temporal_avg_pool"]),
        ("image_feature_source", ["spatial_avg_pool", "temporal_avg_pool", "last_frame"]),
        ("image_pos_embed", {"type": "sinusoidal", "max_pos_embeddings": 50}),
        ("visual_temporal_embedding", {"type": "LEARNED", "max_temporal_embeddings": 100}),
        ("patch_prenorm", [True, True, True, True]),
        ("projection_dim", 48),
    ],
)
def test_what_the_native_class_cannot_express_is_refused_by_name(tmp_path, tensors, place, value):
    config = read_config()
    config["vision_config"][place] = value
    folder = write_checkpoint(tmp_path / "model", tensors, config=config)
    with pytest.raises(CaptionTrainError, match=rf"vision_config\.{place}"):
        FAMILY.load(str(folder))


@pytest.mark.parametrize("model_type", [None, ""])
def test_a_config_without_model_type_is_legacy_by_the_rest(tmp_path, tensors, state, model_type):
    config = read_config() | {"model_type": model_type}
    check_weights(FAMILY.load(str(write_checkpoint(tmp_path / "model", tensors, config=config)))[0], state)


def test_a_legacy_folder_without_telling_config_is_known_by_its_tensors(tmp_path, tensors):
    """There transformers would load a model of default size, most of it random."""
    config = read_config()
    del config["vision_config"]["dim_embed"]
    folder = write_checkpoint(tmp_path / "model", tensors, config=config)
    assert find_checkpoint(str(folder)).is_legacy
    with pytest.raises(CaptionTrainError, match=r"another shape than config\.json says"):
        FAMILY.load(str(folder))


def test_the_recomputable_buffer_may_be_missing(tmp_path, tensors, state, capfd):
    kept = {name: tensor for name, tensor in tensors.items() if "pos_idx_to_embed" not in name}
    model, _ = FAMILY.load(str(write_checkpoint(tmp_path / "model", kept)))
    assert "MISSING" not in capfd.readouterr().err
    name = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
    torch.testing.assert_close(model.state_dict()[name], state[name])


def test_code_in_a_bin_file_is_not_run(tmp_path, tensors):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    folder = write_checkpoint(tmp_path / "model", tensors | {"x": Evil()})
    with pytest.raises(CaptionTrainError):
        FAMILY.load(str(folder))


def change_vision(folder, **fields):
    config = read_config()
    config["vision_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "no weights"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"PK"), "pytorch_model.bin"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "vocab.json")], "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "nor vocab.json and merges.txt"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer of .* cannot be read"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("{"),
            r"preprocessor_config\.json: cannot be read: broken JSON",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: holds no JSON object"),
        (lambda folder: torch.save([], folder / "pytorch_model.bin"), "other things than tensors"),
        (lambda folder: torch.save({"step": 3}, folder / "pytorch_model.bin"), "other .* tensors: step"),
        (lambda folder: change_vision(folder, depths=[1, 1]), "config.json describes no Florence-2"),
        (lambda folder: change_vision(folder, dim_embed="wide"), "config.json describes no Florence-2"),
    ],
)
def test_an_incomplete_folder_is_one_line(tmp_path, tensors, change, message):
    folder = write_checkpoint(tmp_path / "model", tensors)
    change(folder)
    with pytest.raises(CaptionTrainError, match=message) as caught:
        FAMILY.load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path, tensors):
    folder = write_checkpoint(tmp_path / "model", tensors, layout="safetensors", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CaptionTrainError, match=r"model-00002-of-00002\.safetensors"):
        FAMILY.load(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CaptionTrainError, match="no weight_map"):
        FAMILY.load(str(folder))


def test_a_cached_hub_model_loads_offline_and_keeps_its_id(tmp_path, tensors, state, monkeypatch):
    cache = tmp_path / "hub" / "models--microsoft--Florence-2-tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    write_checkpoint(cache / "snapshots" / ("a" * 40), tensors)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, _ = FAMILY.load("microsoft/Florence-2-tiny")
    check_weights(model, state)
    assert model.name_or_path == "microsoft/Florence-2-tiny"
    (cache / "snapshots" / ("a" * 40) / "pytorch_model.bin").unlink()
    with pytest.raises(CaptionTrainError, match="no weights in the local cache, and the hub cannot be"):
        FAMILY.load("microsoft/Florence-2-tiny")


def test_what_is_saved_loads_in_plain_transformers_with_the_settings_of_old(tmp_path, tensors):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = FAMILY.load(str(write_checkpoint(tmp_path / "model", tensors)))
    model.save_pretrained(tmp_path / "native")
    processor.save_pretrained(tmp_path / "native")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    plain = AutoProcessor.from_pretrained(tmp_path / "native", backend="pil")
    assert plain.image_token_id == again.config.image_token_id == 775
    assert plain.num_image_tokens == 577
    settings = again.generation_config.to_diff_dict()
    assert settings == model.generation_config.to_diff_dict()
    assert settings.items() >= {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True}.items()


def test_names_go_there_and_back(tensors):
    for name in tensors.keys() - {"language_model.final_logits_bias"}:
        assert legacy_name(native_name(name)) == name
    assert native_name("language_model.final_logits_bias") is None
    assert native_name("vision_tower.convs.0.projection") is None
    assert len({legacy for legacy, _ in PAIRS}) == len({native for _, native in PAIRS}) == len(PAIRS)

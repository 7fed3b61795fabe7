"""Weights of every kind and name load completely, and what is wrong with a folder is said in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, PreTrainedTokenizerFast

from caption_train.cli.commands import export_main
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.families.moondream.config import native_dict
from caption_train.families.moondream.legacy.checkpoint import write_legacy
from caption_train.families.moondream.legacy.names import to_names_of_2024
from examples.tiny_moondream import REGION
from tests.fixtures.moondream import make_small_model

FAMILY = get_family("moondream")
QKV = "model.text.blocks.1.attn.qkv.weight"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An official folder, and the model in it."""
    model, processor = make_small_model(
        text={"dim": 256, "n_heads": 4, "n_kv_heads": 2}, region={**REGION, "dim": 256}
    )
    folder = tmp_path_factory.mktemp("official")
    write_legacy(folder, model.config, model.state_dict(), processor.tokenizer)
    return folder, model


@pytest.fixture
def rewrite(official, tmp_path):
    """Return a function that copies the folder with other weights, config or tokenizer."""

    def rewrite(change=lambda tensors: tensors, save=None, config=lambda config: config, tokenizer=True):
        tensors = change(load_file(official[0] / "model.safetensors"))
        (save or (lambda t, folder: save_file(t, folder / "model.safetensors")))(tensors, tmp_path)
        if (changed := config(json.loads((official[0] / "config.json").read_text()))) is not None:
            (tmp_path / "config.json").write_text(json.dumps(changed))
        if tokenizer:
            (tmp_path / "tokenizer.json").write_bytes((official[0] / "tokenizer.json").read_bytes())
        return str(tmp_path)

    return rewrite


def save_bin_shards(tensors, folder):
    names, index = sorted(tensors), {}
    for shard in range(2):
        file = f"pytorch_model-{shard + 1:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[shard::2]}, folder / file)
        index |= dict.fromkeys(names[shard::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def as_the_training_script_saves(tensors):
    caches = {
        f"text.blocks.{i}.kv_cache.{kind}_cache": torch.zeros(1, 2, 8, 64) for i in (0, 1) for kind in "kv"
    }
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()} | caches


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_an_index_that_names_no_weights_is_told_in_one_line(rewrite, content):
    folder = Path(rewrite(save=lambda tensors, folder: None))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CaptionTrainError) as error:
        FAMILY.load(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "save",
    [
        lambda t, folder: torch.save(t, folder / "pytorch_model.bin"),
        lambda t, folder: torch.save(t, folder / "moondream.pt"),
        save_bin_shards,
        lambda t, folder: save_file(t, folder / "moondream_finetune.safetensors"),
    ],
    ids=["bin", "pt", "bin shards", "a name of one's own"],
)
def test_weights_load_whatever_file_they_are_in(official, rewrite, save):
    model, _ = FAMILY.load(rewrite(as_the_training_script_saves, save))
    assert same_state(model, official[1])


def test_captions_are_counted_without_the_weights(official, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((official[0] / name).read_bytes())
    processor, loaded = FAMILY.load_text_processor(str(tmp_path)), FAMILY.load(str(official[0]))[1]
    assert FAMILY.tokenize_caption(processor, "a cat") == FAMILY.tokenize_caption(loaded, "a cat")
    assert processor.tokenizer.model_max_length == loaded.tokenizer.model_max_length


def test_heads_that_the_config_leaves_out_are_counted_in_the_weights(official, rewrite):
    def leave_out(config):
        del config["config"]["text"]["n_kv_heads"]
        return config

    assert same_state(FAMILY.load(rewrite(config=leave_out))[0], official[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "model.text.wte"}, "1 tensors are not .*: text.wte$"),
        (lambda t: {n: v for n, v in t.items() if n != QKV}, r"not in the checkpoint: text\.blocks\.1\.attn"),
        (lambda t: {n: v for n, v in t.items() if ".vision." not in n}, "not in the checkpoint: vision"),
        (
            lambda t: {n: v for n, v in t.items() if "region.coord" not in n},
            "7 tensors are not .*: region.coord",
        ),
        (
            lambda t: t | {QKV: t[QKV][:, :-1].clone()},
            r"blocks.1.attn.qkv.weight is \[512, 255\], not \[512, 256\]",
        ),
        (lambda t: t | {"model.text.x": torch.zeros(1)}, "1 tensors of the checkpoint have no place: text.x"),
    ],
)
def test_tensors_that_do_not_fit_are_named(rewrite, change, message, capsys):
    folder = rewrite(change)
    with pytest.raises(CaptionTrainError, match=message) as caught:
        FAMILY.load(folder)
    assert str(caught.value).startswith(f"--model_id {folder}: ") and "\n" not in str(caught.value)
    assert "LOAD REPORT" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_named(rewrite, name):
    folder = rewrite(save=lambda t, folder: (folder / name).write_bytes(b"\x08\0\0\0\0\0\0\0{}junk"))
    with pytest.raises(CaptionTrainError, match=f"{name} is damaged"):
        FAMILY.load(folder)


def test_a_file_that_would_run_code_is_refused(rewrite):
    folder = rewrite(save=lambda t, folder: torch.save(t | {"x": Path.unlink}, folder / "pytorch_model.bin"))
    with pytest.raises(CaptionTrainError, match="holds other things than tensors"):
        FAMILY.load(folder)


def test_a_folder_without_tokenizer_says_which_it_wants(rewrite):
    with pytest.raises(UsageError, match=r"no tokenizer.json in it.*moondream/starmie-v1"):
        FAMILY.load(rewrite(tokenizer=False))


def test_a_tokenizer_that_is_not_cached_is_called_by_its_name(official, monkeypatch, tmp_path):
    """The weights are there; the tokenizer of 2025-06-21 lies in another repository."""
    from caption_train.families.moondream.files import read_tokenizer

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CaptionTrainError, match=r"tokenizer\.json of moondream/starmie-v1, is not in the local"
    ):
        read_tokenizer("vikhyatk/moondream2", "2025-06-21", 0)


def test_a_revision_that_is_no_release_is_refused_where_nothing_says_more(official, monkeypatch):
    monkeypatch.setattr(
        "caption_train.families.moondream.legacy.checkpoint.find_folder", lambda *args, **kwargs: official[0]
    )
    from caption_train.families.moondream.legacy.checkpoint import read_legacy

    assert read_legacy("someone/finetuned", revision="abc123")[0].bos_token_id == 0  # its config.json says so
    config = official[0] / "config.json"
    kept = config.read_text()
    config.write_text(json.dumps({**json.loads(kept), "config": {"vision": {"enc_n_heads": 2}}}))
    with pytest.raises(UsageError, match=r"--revision 2024-07-23: nothing in vikhyatk/moondream2 says"):
        read_legacy("vikhyatk/moondream2", revision="2024-07-23")
    config.write_text(kept)


@pytest.fixture
def of_2024(tmp_path):
    """A model of 2024 and its processor, with a tokenizer whose end of text has CodeGen's id."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    from caption_train.families.moondream.processor import MoondreamProcessor
    from caption_train.families.moondream.releases import REVISIONS

    changes = {**REVISIONS["2024-08-26"], "answer_token_id": None, "text": {"vocab_size": 50304}}
    model, _ = make_small_model(**changes)
    return model, MoondreamProcessor.from_config(model.config, tokenizer)


def test_a_model_of_2024_is_written_in_its_own_layout_and_read_again_as_one(of_2024, tmp_path):
    model, processor = of_2024
    FAMILY.save_legacy(model, processor, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "text_model.transformer.h.1.mixer.Wqkv.weight" in tensors
    assert tensors["region_model.coordinate_features.weight"].shape == (4, 1)
    again, processor = FAMILY.load(str(tmp_path))
    assert same_state(again, model)
    fields = (
        "crops",
        "prefix_attention",
        "local_pooling",
        "overlap_margin",
        "bos_token_id",
        "answer_token_id",
    )
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in fields)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.crops == "fixed"


def test_old_names_alone_do_not_make_a_model_of_2024(official, rewrite):
    """The official code of 2025 reads the old names too, and does with the weights what it always does."""
    model, _ = FAMILY.load(rewrite(to_names_of_2024))
    assert same_state(model, official[1])
    assert model.config.prefix_attention and model.config.crops == "overlap"


def test_the_auto_processor_reads_an_official_folder(official):
    processor = AutoProcessor.from_pretrained(official[0])
    expected = FAMILY.load(str(official[0]))[1]
    assert processor.prompt_ids("What is it?") == expected.prompt_ids("What is it?")
    assert processor.image_processor.to_dict() == expected.image_processor.to_dict()


def test_exporting_there_and_back_gives_the_same_bits(official, tmp_path):
    source, native, again = official[0], tmp_path / "native", tmp_path / "again"
    assert export_main([str(source), str(native), "--family", "moondream"]) == 0
    assert export_main([str(native), str(again), "--family", "moondream", "--layout", "legacy"]) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (source, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert json.loads((again / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize(("release", "space"), [("2025-01-09", False), ("2025-04-14", True), (None, True)])
def test_a_release_knows_whether_a_space_precedes_the_question(release, space):
    """A filled config.json has no word for it: CodeGen's releases had one, but for the first."""
    official = {"config": {"tokenizer": {"bos_id": 50256, "eos_id": 50256}}}
    assert native_dict(official, release)["question_space"] == space


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "moondream1"}'])
def test_a_native_folder_whose_config_gives_no_sizes_is_refused_at_once(content, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("moondream"), tmp_path / "base")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CaptionTrainError, match=r"config\.json"):
        FAMILY.load(str(folder))

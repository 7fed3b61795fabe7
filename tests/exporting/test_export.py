"""Exports caption as their source does, load in other tools, and convert back bit for bit."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from caption_train.cli.commands import caption_main, export_main
from caption_train.exporting import export
from caption_train.families import get_family
from caption_train.families.base import Generated
from tests.fixtures.florence_legacy import (
    FIXTURES,
    needs_fixtures,
    read_config,
    read_tensors,
    shrink_images,
    write_checkpoint,
)
from tests.fixtures.paths import REPOSITORY

pytestmark = needs_fixtures
ADAPTERS = ["lora_attention", "lora_roboflow_style"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("legacy") / "checkpoint", read_tensors())
    return str(shrink_images(folder))


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tokenizer_config.json"}


def test_a_model_comes_back_bit_for_bit(tmp_path, capsys, checkpoint):
    native, legacy, again = (tmp_path / name for name in ("native", "legacy", "again"))
    assert export_main([checkpoint, str(native)]) == 0
    assert "tokens agree" in capsys.readouterr().out
    assert export_main([str(native), str(legacy), "--layout", "legacy"]) == 0
    assert export_main([str(legacy), str(again)]) == 0
    assert read_files(native) == read_files(again)
    written, original = load_file(legacy / "model.safetensors"), read_tensors()
    assert written.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


def test_the_legacy_files_are_those_of_the_fixture(tmp_path, checkpoint):
    export_main([checkpoint, str(tmp_path / "legacy"), "--layout", "legacy"])
    written, original = json.loads((tmp_path / "legacy" / "config.json").read_text()), read_config()
    assert written["vision_config"] == original["vision_config"]
    ignored = {"add_bias_logits", "add_final_layer_norm", "classif_dropout", "gradient_checkpointing"}
    ignored |= {"label2id", "normalize_before"}
    expected = {name: value for name, value in original["text_config"].items() if name not in ignored}
    assert written["text_config"].items() >= expected.items()
    assert {name: written[name] for name in ("auto_map", "model_type", "vocab_size", "projection_dim")} == {
        name: original[name] for name in ("auto_map", "model_type", "vocab_size", "projection_dim")
    }
    images = json.loads((tmp_path / "legacy" / "preprocessor_config.json").read_text())
    saved = json.loads((FIXTURES / "checkpoint_safetensors" / "preprocessor_config.json").read_text())
    assert images.keys() == saved.keys()
    assert images["size"] == {"height": 192, "width": 192}
    tokens = json.loads((tmp_path / "legacy" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in tokens["model"]["merges"])
    assert not any(token["content"].startswith("madeupword") for token in tokens["added_tokens"])


def test_the_remote_code_comes_along_where_the_base_has_it(tmp_path):
    source = shrink_images(write_checkpoint(tmp_path / "source", read_tensors()))
    (source / "modeling_florence2.py").write_text("raise RuntimeError('never run')")
    assert export_main([str(source), str(tmp_path / "legacy"), "--layout", "legacy"]) == 0
    assert (tmp_path / "legacy" / "modeling_florence2.py").read_text() == "raise RuntimeError('never run')"


def test_float16_and_untied_heads_survive(tmp_path):
    head = load_file(FIXTURES / "untied_lm_head.safetensors")
    tensors = {name: tensor.half() for name, tensor in (read_tensors() | head).items()}
    source = shrink_images(write_checkpoint(tmp_path / "source", tensors, layout="safetensors"))
    assert export_main([str(source), str(tmp_path / "native")]) == 0
    assert export_main([str(tmp_path / "native"), str(tmp_path / "legacy"), "--layout", "legacy"]) == 0
    written = load_file(tmp_path / "legacy" / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in written.items())
    assert json.loads((tmp_path / "legacy" / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_merge_that_half_precision_rounds_to_other_tokens_is_in_float32(tmp_path, monkeypatch, capsys):
    tensors = {name: tensor.half() for name, tensor in read_tensors().items()}
    base = ["--base_model", str(shrink_images(write_checkpoint(tmp_path / "base", tensors)))]
    answers = [Generated("a car", [3, 2]), Generated("a cat", [4, 2])]
    sequence = iter([*answers, answers[0], answers[0]])
    monkeypatch.setattr(export, "caption_once", lambda *arguments: next(sequence))
    arguments = [str(FIXTURES / "lora_attention"), str(tmp_path / "merged"), "--merge", *base]
    assert export_main(arguments) == 0
    assert "in float32: the base's own precision rounds" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]
    sequence = iter(answers)
    assert export_main([*arguments, "--dtype", "float16", "--overwrite"]) == 1
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_comes_back_bit_for_bit(tmp_path, name, checkpoint):
    native, legacy, again = (tmp_path / folder for folder in ("native", "legacy", "again"))
    base = ["--base_model", checkpoint]
    assert export_main([str(FIXTURES / name), str(native), *base]) == 0
    assert export_main([str(native), str(legacy), "--layout", "legacy", *base]) == 0
    assert export_main([str(legacy), str(again), *base]) == 0
    written = load_file(legacy / "adapter_model.safetensors")
    original = load_file(FIXTURES / name / "adapter_model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(tensor, original[key]) for key, tensor in written.items())
    assert read_files(native) == read_files(again)
    known = json.loads((FIXTURES / name / "adapter_config.json").read_text())
    assert json.loads((legacy / "adapter_config.json").read_text()).keys() <= known.keys()


@pytest.mark.parametrize("layout", ["native", "legacy"])
def test_a_merged_model_needs_no_adapter(tmp_path, layout, checkpoint):
    source = str(FIXTURES / "lora_roboflow_style")
    merged = str(tmp_path / "merged")
    assert export_main([source, merged, "--base_model", checkpoint, "--merge", "--layout", layout]) == 0
    model, _ = get_family("florence").load(merged)
    assert not model.config.tie_word_embeddings


def test_what_is_merged_loads_in_plain_transformers_and_peft(tmp_path, checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    export_main([checkpoint, str(tmp_path / "base")])
    base = str(tmp_path / "base")
    export_main([str(FIXTURES / "lora_attention"), str(tmp_path / "lora"), "--base_model", base])
    export_main([str(tmp_path / "lora"), str(tmp_path / "merged"), "--base_model", base, "--merge"])
    ids = torch.tensor([[0, 315, 455, 267, 2]])
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "lora")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = adapted(input_ids=ids, labels=ids).logits
        torch.testing.assert_close(merged(input_ids=ids, labels=ids).logits, expected, atol=1e-4, rtol=0)
        assert (adapted.base_model(input_ids=ids, labels=ids).logits - expected).abs().max() == 0


def test_a_blip_adapter_is_merged(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base = str(REPOSITORY / "examples" / "bases" / "blip-tiny")
    family = get_family("blip")
    torch.manual_seed(0)
    targets = list(family.facts.lora_target_modules)
    config = LoraConfig(target_modules=targets, init_lora_weights=False, base_model_name_or_path=base)
    get_peft_model(family.load(base)[0], config).save_pretrained(tmp_path / "lora")
    arguments = [str(tmp_path / "lora"), str(tmp_path / "merged"), "--family", "blip", "--base_model", base]
    assert export_main([*arguments, "--merge"]) == 0
    assert "tokens agree" in capsys.readouterr().out
    assert export_main([*arguments, "--overwrite"]) == 2
    assert "BLIP's only layout already" in capsys.readouterr().err


@pytest.fixture
def blip_lora(tmp_path):
    """A LoRA of BLIP that says what it was trained with, on a base of its own."""
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    shutil.copytree(REPOSITORY / "examples" / "bases" / "blip-tiny", base)
    config = LoraConfig(target_modules=["query"], base_model_name_or_path=str(base))
    get_peft_model(get_family("blip").load(str(base))[0], config).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "training.json").write_text(
        json.dumps({"family": "blip", "base_model": str(base), "prompt": "a large"})
    )
    return tmp_path / "lora"


def test_a_merged_model_is_asked_what_its_adapter_was(tmp_path, capsys, blip_lora):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    assert export_main([str(blip_lora), str(tmp_path / "merged"), "--merge"]) == 0
    assert export_main([str(tmp_path / "merged"), str(tmp_path / "again"), "--family", "blip"]) == 0
    capsys.readouterr()
    models = [["--peft_model", str(blip_lora)]]
    models += [["--base_model", str(tmp_path / name)] for name in ("merged", "again")]
    for model in models:
        assert caption_main("blip", ["--images", str(tmp_path / "a.png"), "--num_workers", "0", *model]) == 0
    captions = capsys.readouterr().out.splitlines()
    assert "a large" in captions[0]
    assert captions == captions[:1] * 3
    assert not (tmp_path / "merged" / "README.md").exists()


def test_overwrite_replaces_the_folder_behind_a_link(tmp_path, blip_lora):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert export_main([str(blip_lora), str(tmp_path / "link"), "--merge", "--overwrite"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".export*"))


@pytest.mark.parametrize(("target", "message"), [("base", "holds, the base"), ("file", "is a file")])
def test_neither_the_base_nor_a_file_is_replaced(tmp_path, capsys, blip_lora, target, message):
    (tmp_path / "file").touch()
    assert export_main([str(blip_lora), str(tmp_path / target), "--merge", "--overwrite"]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").is_file()
    assert not (tmp_path / "base" / "training.json").exists()


def test_a_head_that_is_the_embedding_is_not_merged(tmp_path, capsys, blip_lora):
    from peft import LoraConfig, get_peft_model

    # So little that the tokens agree: only the weights tell.
    model = get_peft_model(
        get_family("blip").load(str(tmp_path / "base"))[0], LoraConfig(target_modules=["predictions.decoder"])
    )
    model.save_pretrained(blip_lora)
    assert export_main([str(blip_lora), str(tmp_path / "new"), "--merge"]) == 1
    assert "predictions.decoder cannot be merged: its weights are shared" in capsys.readouterr().err


def test_a_florence_head_as_peft_saves_it_is_loaded_and_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = str(REPOSITORY / "examples" / "bases" / "florence2-tiny")
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(get_family("florence").load(base)[0], config).save_pretrained(tmp_path / "lora")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(
        tmp_path / "lora" / "adapter_model.safetensors"
    )
    assert export_main([str(tmp_path / "lora"), str(tmp_path / "new"), "--merge", "--base_model", base]) == 0


def test_an_adapter_without_weights_is_one_line(tmp_path, capsys, blip_lora):
    (blip_lora / "adapter_model.safetensors").unlink()
    assert export_main([str(blip_lora), str(tmp_path / "new"), "--merge"]) == 1
    assert "there are no weights: none of adapter_model.safetensors" in capsys.readouterr().err
    (blip_lora / "adapter_config.json").write_text("[]")
    assert export_main([str(blip_lora), str(tmp_path / "new"), "--merge"]) == 1
    assert "adapter_config.json: holds no JSON object" in capsys.readouterr().err


def test_nothing_is_written_when_the_tokens_differ(tmp_path, monkeypatch, capsys, checkpoint):
    answers = iter([Generated("a car", [3, 2]), Generated("a cat", [4, 2])])
    monkeypatch.setattr(export, "caption_once", lambda *arguments: next(answers))
    assert export_main([checkpoint, str(tmp_path / "native")]) == 1
    assert "'a cat' instead of 'a car'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_image_and_prompt_of_the_check_can_be_given(tmp_path, monkeypatch, checkpoint):
    seen = []

    def caption(family, model, processor, image, prompt):
        seen.append((image.size, prompt))
        return Generated("", [2])

    monkeypatch.setattr(export, "caption_once", caption)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    arguments = ["--image", str(tmp_path / "a.png"), "--prompt", "<OCR>"]
    assert export_main([checkpoint, str(tmp_path / "native"), *arguments]) == 0
    assert seen == [((30, 20), "<OCR>")] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "source is required"),
        (["CHECKPOINT", "new", "--merge"], "--merge needs an adapter"),
        (["CHECKPOINT", "taken"], "exists already"),
        ([str(FIXTURES / "lora_attention"), "new", "--dtype", "float16"], "give --merge too"),
        (["taken", ".", "--overwrite"], "is, or holds, what is exported"),
        (["nowhere/at/all", "new"], "source nowhere/at/all: there is no such folder"),
        (
            [str(FIXTURES / "lora_attention"), "new", "--base_model", "no/such/base"],
            "--base_model no/such/base",
        ),
        (["CHECKPOINT", "new", "--family", "blip", "--layout", "legacy"], "BLIP has one layout only"),
        (["CHECKPOINT", "new", "--image", "no.png"], "no.png"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, checkpoint, arguments, message):
    arguments = [checkpoint if argument == "CHECKPOINT" else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    assert export_main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_an_adapter_in_the_layout_asked_for_is_not_rewritten(tmp_path, capsys, checkpoint):
    source = str(FIXTURES / "lora_attention")
    target = str(tmp_path / "new")
    assert export_main([source, target, "--layout", "legacy", "--base_model", checkpoint]) == 2
    assert "legacy layout already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

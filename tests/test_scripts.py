"""The scripts as people call them: the reference's flags and defaults, the three steps, one-line errors."""

import json
import re
from pathlib import Path

import pytest

from caption_train.cli.commands import caption_main, compile_main, train_main
from caption_train.families import get_family
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.sample_set import CAPTIONS

FLORENCE_TARGETS = ["qkv", "proj", "k_proj", "v_proj", "q_proj", "out_proj"]
BLIP_TARGETS = [
    *("self.query", "self.key", "self.value", "output.dense"),
    *("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"),
]
SHARED_DEFAULTS = {
    "device": None,
    "rank": 16,
    "alpha": 32,
    "dropout": 0.05,
    "weight_decay": 1e-4,
    "epochs": 5,
}

TRAIN_BLIP = """--device cpu --model_id Salesforce/blip-image-captioning-large --rank 8 --alpha 16
    --dropout 0.1 --target_modules self.query mlp.fc1 --learning_rate 1e-4
    --weight_decay 0 --batch_size 4 --epochs 2"""
TRAIN_FLORENCE = """--dataset_dir data --output_dir out --device cpu --model_id microsoft/Florence-2-large-ft
    --seed 7 --log_with all --name style --rank 8 --alpha 16 --dropout 0.1 --target_modules qkv proj
    --learning_rate 1e-5 --weight_decay 0 --batch_size 2 --gradient_accumulation_steps 4 --epochs 2
    --gradient_checkpointing --quantize --accumulation_compression --rslora --sample_every_n_epochs 1
    --sample_every_n_steps 10 --save_every_n_epochs 1 --save_every_n_steps 10 --optimizer_name Flora
    --scheduler OneCycle --accumulation_rank 8 -ac --accumulation-rank 4 --optimizer_rank 8"""
CAPTION_BLIP = """--base_model Salesforce/blip-image-captioning-large --peft_model lora --images photos
    --beams=10 --seed 7 --save_captions --caption_extension .caption --max_token_length 50"""
CAPTION_FLORENCE = """--base_model=microsoft/Florence-2-large --peft_model lora --images photos --seed 7
    --batch_size 8 --save_captions --overwrite --caption_extension .caption --max_token_length 50"""


def test_blips_training_flags_and_defaults_are_the_references(parsed):
    assert train_main("blip", ["data", "out"]) == 2
    expected = SHARED_DEFAULTS | {
        "dataset_dir": Path("data"),
        "output_dir": Path("out"),
        "model_id": "Salesforce/blip-image-captioning-base",
        "target_modules": BLIP_TARGETS,
        "learning_rate": 1e-3,
        "batch_size": 2,
    }
    assert expected.items() <= vars(parsed[-1]).items()
    train_main("blip", [*TRAIN_BLIP.split(), "data", "out"])
    expected = {
        "rank": 8,
        "target_modules": ["self.query", "mlp.fc1"],
        "dataset_dir": Path("data"),
        "epochs": 2,
    }
    assert expected.items() <= vars(parsed[-1]).items()


def test_florences_training_flags_and_defaults_are_the_references(parsed):
    assert train_main("florence", ["--dataset_dir", "data", "--output_dir", "out"]) == 2
    expected = SHARED_DEFAULTS | {
        "model_id": "microsoft/Florence-2-base-ft",
        "target_modules": FLORENCE_TARGETS,
        "learning_rate": 1e-4,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "optimizer_name": "AdamW",
        "scheduler": "OneCycle",
        "quantize": None,
        "log_with": None,
    }
    assert expected.items() <= vars(parsed[-1]).items()
    train_main("florence", TRAIN_FLORENCE.split())
    expected = {
        **{"accumulation_rank": 4, "activation_checkpointing": True, "quantize": "4bit", "rslora": True},
        **{
            "optimizer_name": "Flora",
            "log_with": "all",
            "name": "style",
            "seed": 7,
            "save_every_n_steps": 10,
        },
    }
    assert expected.items() <= vars(parsed[-1]).items()


@pytest.mark.parametrize(
    ("family", "flags", "expected"),
    [
        ("blip", CAPTION_BLIP, {"beams": 10, "max_token_length": 50, "save_captions": True}),
        ("florence", CAPTION_FLORENCE, {"batch_size": 8, "overwrite": True, "caption_extension": ".caption"}),
    ],
)
def test_captioning_flags_are_the_references(family, flags, expected, parsed):
    assert caption_main(family, flags.split()) == 2
    assert (expected | {"images": ["photos"], "peft_model": Path("lora")}).items() <= vars(parsed[-1]).items()


@pytest.mark.parametrize("name", get_family("florence").base_models)
def test_every_base_of_the_reference_is_accepted(name, parsed):
    assert caption_main("florence", ["--images", "photos", "--base_model", name]) == 2
    assert parsed[-1].base_model == name


def test_compiling_takes_one_folder_or_two(parsed):
    compile_main(["data"])
    assert (parsed[-1].dataset_dir, parsed[-1].output_dir) == (Path("data"), None)
    compile_main(["data", "out"])
    assert (parsed[-1].dataset_dir, parsed[-1].output_dir) == (Path("data"), Path("out"))


MAINS = {
    "compile_captions.py": compile_main,
    "train_blip_network.py": lambda argv: train_main("blip", argv),
    "train_florence_lora.py": lambda argv: train_main("florence", argv),
    "inference.py": lambda argv: caption_main("blip", argv),
    "inference_florence.py": lambda argv: caption_main("florence", argv),
}


def help_of(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        MAINS[script](["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", MAINS)
def test_every_flag_in_the_references_help_is_in_ours(script, capsys):
    reference = REPOSITORY.parent / "shared" / "SEED.md"
    if not reference.is_file():
        pytest.skip(f"{reference} is not here; the flags are in the tables above too")
    block = re.search(rf"\$ [^\n]*{re.escape(script)} --help\n(.*?)^```", reference.read_text(), re.S | re.M)[
        1
    ]
    flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", block.partition("options:")[2])) - {"-rank", "-h"}
    assert "--help" in flags
    assert flags <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(script, capsys)))


@pytest.mark.parametrize("script", MAINS)
def test_help_shows_groups_and_defaults_in_110_columns(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = help_of(script, capsys)
    assert "(default: " in text
    assert all(len(line) <= 110 for line in text.splitlines())
    assert len(re.findall(r"^[\w -]+:$", text, re.M)) >= 4


def test_config_files_are_read_and_the_command_line_wins(parsed, tmp_path, capsys):
    config = tmp_path / "style.yaml"
    config.write_text("rank: 64\nalpha: 8\ntarget_modules: [qkv]\nquantize: true\nrslora: true\n")
    argv = ["--config", str(config), "--dataset_dir", "data", "--output_dir", "out", "--alpha", "4"]
    train_main("florence", argv)
    expected = {"rank": 64, "alpha": 4, "target_modules": ["qkv"], "quantize": "4bit", "rslora": True}
    assert expected.items() <= vars(parsed[-1]).items()
    capsys.readouterr()
    config.write_text("rnak: 64\n")
    assert train_main("florence", argv) == 2
    assert capsys.readouterr().err.endswith(f"--config {config}: unknown key 'rnak'; did you mean rank?\n")


@pytest.mark.parametrize("family", ["blip", "florence"])
def test_folder_in_lora_trained_captions_out(family, tiny_base, pairs_folder, tmp_path, capsys):
    dataset, lora, output = tmp_path / "data set", tmp_path / "my lora", tmp_path / "captions.jsonl"
    assert compile_main([str(pairs_folder), str(dataset)]) == 0
    argv = [str(dataset), str(lora), "--model_id", str(tiny_base(family)), "--device", "cpu"]
    assert train_main(family, [*argv, "--epochs", "1", "--batch_size", "2", "--rank", "2"]) == 0
    summary = json.loads((lora / "summary.json").read_text())
    assert (summary["global_step"], summary["images"]) == (2, 4)
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json", "README.md"} <= {
        path.name for path in lora.iterdir()
    }
    argv = ["--images", str(dataset), "--peft_model", str(lora), "--output", str(output), "--device", "cpu"]
    capsys.readouterr()
    assert caption_main(family, [*argv, "--max_token_length", "4", "--num_workers", "0"]) == 0
    assert len(output.read_text("utf-8").splitlines()) == len(CAPTIONS)
    assert "4 images captioned" in capsys.readouterr().err


UNCACHED = "nobody/nothing-like-this"
BAD_COMMANDS = {
    "a missing folder": ("{tmp}/none {tmp}/out", 2, "none"),
    "a folder without images": ("{tmp}/empty {tmp}/out", 2, "nothing to read"),
    "a value that is no number": ("{pairs} {tmp}/out --rank many", 2, "--rank"),
    "a value out of range": ("{pairs} {tmp}/out --dropout 1.5", 2, "--dropout"),
    "an unknown flag": ("{pairs} {tmp}/out --learnig_rate 1", 2, "--learnig_rate"),
    "an unknown optimizer": ("{pairs} {tmp}/out --optimizer_name SGD", 2, "--optimizer_name"),
    "a folder that is no model": ("{pairs} {tmp}/out --model_id {tmp}/empty", 1, "--model_id"),
    "a model folder that is not there": ("{pairs} {tmp}/out --model_id {tmp}/none", 2, "--model_id"),
    "offline, and the model not cached": ("{pairs} {tmp}/out --model_id " + UNCACHED, 1, UNCACHED),
    "a device that is not there": ("{pairs} {tmp}/out --device cuda:99", 2, "--device cuda:99"),
    "no arguments": ("", 2, "--dataset_dir"),
}


@pytest.mark.parametrize("family", ["blip", "florence"])
@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_an_error_is_a_line_and_an_exit_code(case, family, pairs_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    command, code, named = BAD_COMMANDS[case]
    argv = [word.format(tmp=tmp_path, pairs=pairs_folder) for word in command.split()]
    assert train_main(family, argv) == code
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert len(error.splitlines()) == (2 if case == "no arguments" else 1)


def test_combinations_that_cannot_work_name_both_flags_before_a_model_loads(
    pairs_folder, tmp_path, capsys, monkeypatch
):
    family = type(get_family("florence"))
    monkeypatch.setattr(family, "load", lambda *args, **keywords: pytest.fail("loaded"))
    argv = [str(pairs_folder), str(tmp_path), "--accumulation_compression", "--optimizer_name", "AdamW"]
    assert train_main("florence", argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--accumulation_compression" in line and "--optimizer_name AdamW" in line


def test_everything_wrong_is_said_at_once(pairs_folder, tmp_path, capsys):
    argv = [str(pairs_folder), str(tmp_path), "--rank", "0", "--epochs", "0", "--keep_tokens", "1"]
    assert train_main("blip", argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("--" in line for line in lines)


@pytest.mark.parametrize("family", ["blip", "florence"])
def test_captioning_errors_are_lines_too(family, pairs_folder, tmp_path, capsys):
    for argv, named in (
        ([], "--images"),
        (["--images", str(tmp_path / "none")], "none"),
        (["--images", str(pairs_folder), "--peft_model", str(tmp_path / "none")], "--peft_model"),
        (["--images", str(pairs_folder), "--peft_model", str(tmp_path)], "adapter_config.json"),
        (["--images", str(pairs_folder), "--beams", "0"], "--beams"),
    ):
        assert caption_main(family, argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line

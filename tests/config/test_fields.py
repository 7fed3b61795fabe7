"""What flags may say."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from caption_train.cli.commands import caption_main, export_main, train_main
from caption_train.config.captioning import CaptionOptions
from caption_train.config.exporting import ExportOptions
from caption_train.config.fields import find_not_utf8
from caption_train.config.training import TrainOptions

BAD = "caf\udce9"
TRAIN = ["train", "blip"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
@pytest.mark.parametrize(
    "flag", ["dataset_dir", "output_dir", "name", "model_id", "prompt", "validation_dir"]
)
def test_what_training_could_not_write_down_is_refused_before_it_begins(tmp_path, capsys, flag):
    values = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), flag: BAD}
    given = [word for name, value in values.items() for word in (f"--{name}", value)]
    assert train_main("blip", given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{flag} caf\\udce9 is not UTF-8" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "flag"),
    [
        (lambda argv: caption_main("blip", argv), ["--images", BAD, "--prefix", BAD], "prefix"),
        (lambda argv: caption_main("blip", argv), ["--images", BAD, "--peft_model", BAD], "peft_model"),
        (export_main, ["a", BAD], "output_dir"),
        (export_main, [BAD, "a"], "source"),
    ],
)
def test_so_is_what_captioning_and_export_could_not(capsys, main, arguments, flag):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{flag} caf\\udce9 is not UTF-8" in line


@pytest.mark.parametrize("options_class", [TrainOptions, CaptionOptions, ExportOptions])
def test_every_text_and_path_is_looked_at(options_class):
    for option in fields(options_class):
        if "str" in str(option.type) or "Path" in str(option.type):
            value = [BAD] if str(option.type).startswith("list") else Path(BAD)
            if "dict" not in str(option.type):
                assert find_not_utf8(options_class(**{option.name: value}))[-1].startswith(f"--{option.name}")

"""What a folder says about itself, and what is refused before anything is loaded."""

import json

import pytest
from PIL import Image

from caption_train.adapters.record import check_base, read_adapter
from caption_train.captioning.job import caption_folder
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from tests.fixtures.fake_family import FakeFamily


@pytest.fixture
def write(tmp_path):
    def write(config_file: str, **training):
        folder = tmp_path / "trained"
        folder.mkdir()
        (folder / config_file).write_text("{}")
        (folder / "training.json").write_text(json.dumps(training))
        return folder

    return write


def caption(tmp_path, **options) -> int:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return caption_folder(
        CaptionOptions(images=[str(tmp_path / "a.png")], num_workers=0, **options), FakeFamily()
    )


def test_a_full_model_brings_the_prompt_it_was_trained_with(write, tmp_path, capsys):
    folder = write("config.json", family="fake", prompt="speak")
    assert caption(tmp_path, base_model=str(folder)) == 0
    assert "speak dark" in capsys.readouterr().out
    assert caption(tmp_path, base_model=str(folder), prompt="tell") == 0
    assert "tell dark" in capsys.readouterr().out


def test_a_full_model_of_another_family_is_refused_naming_the_script(write, tmp_path):
    folder = write("config.json", family="florence", prompt="")
    with pytest.raises(UsageError, match=r"--base_model .*on florence, not on fake.*inference_florence\.py"):
        caption(tmp_path, base_model=str(folder))


def test_a_full_model_is_no_adapter(write):
    folder = write("config.json", family="fake")
    with pytest.raises(UsageError, match=f"a full model: use --base_model {folder}"):
        read_adapter(folder)


def test_an_adapter_whose_base_is_gone_asks_for_one(write, tmp_path):
    folder = write("adapter_config.json", family="fake", base_model=str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"--peft_model .*gone, which is gone; give --base_model"):
        caption(tmp_path, peft_model=folder)


def test_an_adapter_of_another_family_is_refused_naming_the_script(write):
    adapter = read_adapter(write("adapter_config.json", family="moondream"))
    with pytest.raises(UsageError, match=r"inference_moondream\.py"):
        check_base(adapter, "fake", "fake/base", ())

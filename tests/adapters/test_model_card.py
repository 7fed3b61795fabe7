"""The model card tells users how to use the trained folder."""

import pytest

from caption_train.adapters.model_card import write_card
from caption_train.adapters.record import TrainingRecord
from caption_train.config.training import TrainOptions
from caption_train.families import FAMILIES, get_family, name_script
from caption_train.training.monitor.console import print_summary

OPTIONS = {"name": None, "rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-4, "batch_size": 1}
OPTIONS |= {"gradient_accumulation_steps": 1, "epochs": 2}


def read_card(folder, train_method: str) -> str:
    options = OPTIONS | {"train_method": train_method}
    record = TrainingRecord(
        "florence", "base", None, "<CAPTION>", options, {"pairs": 3}, {"caption-train": "1"}, 5, 10
    )
    write_card(folder, record, {"loss": 0.5})
    return (folder / "README.md").read_text()


def test_the_card_of_a_lora_names_its_base_and_the_lora(tmp_path):
    card = read_card(tmp_path, "lora")
    assert "python inference_florence.py --base_model base --peft_model . --images" in card
    assert "# Captioning LoRA" in card and "| rank | 4 |" in card
    assert "`python export_adapter.py base florence-native/`" in card


def test_the_card_of_a_full_model_speaks_of_no_lora(tmp_path):
    card = read_card(tmp_path, "full")
    assert "python inference_florence.py --base_model . --images" in card
    assert "library_name: transformers" in card
    assert all(word not in card for word in ("LoRA", "lora", "rank", "peft", "alpha"))


@pytest.mark.parametrize(("method", "flag"), [("lora", "--peft_model"), ("full", "--base_model")])
def test_the_last_line_of_a_run_can_be_run(tmp_path, capsys, method, flag):
    options = TrainOptions(dataset_dir=tmp_path, output_dir=tmp_path / "a b", train_method=method)
    summary = {
        "global_step": 1,
        "best_step": None,
        "wall_seconds": 1.0,
        "images_per_second": 1.0,
        "loss": 0.5,
    }
    summary |= {"peak_memory_bytes": 1, "skipped_steps": 0, "skipped_files": []}
    print_summary(summary, options, ["python", "inference.py"])
    assert f"  python inference.py {flag} '{tmp_path}/a b' --images FOLDER\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILIES)
def test_the_script_named_is_the_familys(name):
    assert name_script(name) == get_family(name).inference_script

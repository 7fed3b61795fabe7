"""`--init_adapter`: a new run starts from a LoRA's weights, with its rank, targets, base and prompt."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from caption_train.adapters.continuing import adopt_adapter
from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.training.checkpoints.find import list_checkpoints
from caption_train.training.model import resolve_options
from tests.fixtures.runs import make_options, prepare_run, train, write_pairs


@pytest.fixture(scope="module")
def first(tiny_base, tmp_path_factory):
    """A LoRA of rank 4 on q_proj and fc1, its base and its data."""
    folder = tmp_path_factory.mktemp("first")
    data, base = write_pairs(folder / "images", 6), tiny_base("florence")
    settings = {"target_modules": ["q_proj", "fc1"], "alpha": 6.0, "epochs": 1, "task": "<DETAILED_CAPTION>"}
    train("florence", make_options("florence", base, data, folder / "lora", **settings))
    return folder / "lora", base, data


def continue_options(first, output_dir, **changes):
    lora, base, data = first
    settings = {"epochs": 2, "rank": 16, "target_modules": [], "init_adapter": lora, **changes}
    return make_options("florence", base, data, output_dir, **settings)


def read_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_starts_from_the_adapters_weights_rank_targets_and_prompt(first, tmp_path):
    trainer = prepare_run(continue_options(first, tmp_path / "out"), get_family("florence"))
    options, config = trainer.run.options, trainer.run.model.peft_config["default"]
    assert (config.r, config.lora_alpha, options.rank) == (4, 6.0, 4)
    assert options.target_modules == ["q_proj", "fc1"] and trainer.run.record.prompt == "<DETAILED_CAPTION>"
    assert trainer.run.record.options["init_adapter"] == str(first[0])
    saved = read_weights(first[0])
    started = {n.replace(".default", ""): p for n, p in trainer.run.model.named_parameters() if "lora_" in n}
    assert started.keys() == saved.keys() and saved
    assert all(torch.equal(started[name], saved[name]) for name in saved)
    assert trainer.run.progress.global_step == 0 and trainer.run.lr_scheduler.last_epoch == 0


def test_the_weights_move_on_and_a_resumed_run_ends_with_the_same_bits(first, tmp_path):
    options = continue_options(first, tmp_path / "whole", save_every_n_steps=2)
    train("florence", options)
    whole = read_weights(tmp_path / "whole")
    assert any(not torch.equal(whole[name], tensor) for name, tensor in read_weights(first[0]).items())
    checkpoint = list_checkpoints(tmp_path / "whole")[-1]
    resumed = continue_options(first, tmp_path / "resumed", save_every_n_steps=2, resume=str(checkpoint))
    train("florence", resumed)
    assert all(
        torch.equal(whole[name], tensor) for name, tensor in read_weights(tmp_path / "resumed").items()
    )


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"rank": 8}, "rank", "--rank 8: --init_adapter .* was trained with 4; drop the flag"),
        ({"alpha": 8.0}, "alpha", "--alpha 8.0: .* trained with 6.0"),
        ({"dora": True}, "dora", "--dora True: .* trained with False"),
        ({"target_modules": ["k_proj"]}, "target_modules", "--target_modules k_proj: .* with q_proj fc1;"),
        ({"train_parts": ["vision"]}, "train_parts", "--train_parts vision: .* was trained with"),
    ],
)
def test_a_flag_that_differs_from_the_adapter_is_refused(first, tmp_path, changes, given, message):
    options = continue_options(first, tmp_path / "out", sources={given: "command line"}, **changes)
    with pytest.raises(UsageError, match=message):
        adopt_adapter(options)


def test_equal_flags_are_no_problem(first, tmp_path):
    sources = dict.fromkeys(["rank", "target_modules"], "command line")
    options = continue_options(
        first, tmp_path / "out", rank=4, target_modules=["fc1", "q_proj"], sources=sources
    )
    assert adopt_adapter(options)[0].rank == 4


def test_features_are_not_kept_of_a_tower_that_the_adapter_trains(first):
    options = TrainOptions(init_adapter=first[0], cache_features=True)
    with pytest.raises(UsageError, match=r"^--cache_features: --init_adapter .* trains the .* vision part"):
        resolve_options(options, get_family("florence"))


def test_the_base_is_the_adapters_unless_one_is_given(first):
    options = TrainOptions(init_adapter=first[0], model_id="microsoft/Florence-2-base-ft")
    adopted, base = resolve_options(options, get_family("florence"))
    assert adopted.model_id == base.model_id == str(first[1])


def test_an_adapter_of_another_family_is_refused_by_its_flag(first):
    with pytest.raises(
        UsageError, match=r"--init_adapter .*: trained on florence, not on blip; train with train_florence"
    ):
        resolve_options(TrainOptions(init_adapter=first[0]), get_family("blip"))


def test_a_lora_is_never_replaced_by_the_run_that_starts_from_it(first):
    before = read_weights(first[0])
    with pytest.raises(UsageError, match=r"--output_dir .*: holds the LoRA to start from, .*--init_adapter"):
        train("florence", continue_options(first, first[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_weights(first[0]).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is IA3; a plain LoRA"),
        ({"rank_pattern": {"fc1": 8}}, "has rank_pattern beside its LoRA"),
        ({"bias": "all"}, "has bias beside its LoRA"),
    ],
)
def test_what_is_more_than_a_lora_is_refused(first, tmp_path, change, message):
    lora = shutil.copytree(
        first[0], tmp_path / "lora", ignore=shutil.ignore_patterns("step*", "last", "best")
    )
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        adopt_adapter(TrainOptions(init_adapter=lora))


def test_a_lora_of_another_tool_brings_its_modules(first, tmp_path):
    lora = tmp_path / "lora"
    LoraConfig(r=4, lora_alpha=6, target_modules=["fc1", "q_proj"]).save_pretrained(lora)
    (lora / "adapter_model.safetensors").write_bytes((first[0] / "adapter_model.safetensors").read_bytes())
    options = continue_options(
        first, tmp_path / "out", init_adapter=lora, sources={"model_id": "command line"}
    )
    trainer = prepare_run(options, get_family("florence"))
    assert trainer.run.options.target_modules == ["fc1", "q_proj"]
    assert trainer.run.record.base_model == str(first[1])


def test_tensors_that_do_not_fit_are_one_line(first, tmp_path):
    sources = {"model_id": "command line"}
    lora = tmp_path / "lora"
    LoraConfig(r=4, lora_alpha=6, target_modules=["fc1"]).save_pretrained(lora)
    (lora / "adapter_model.safetensors").write_bytes((first[0] / "adapter_model.safetensors").read_bytes())
    options = continue_options(first, tmp_path / "out", init_adapter=lora, sources=sources)
    with pytest.raises(CaptionTrainError, match=r"--init_adapter .*: does not fit this base"):
        prepare_run(options, get_family("florence"))

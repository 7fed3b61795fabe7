"""What the options refuse by themselves, each naming its flag."""

from pathlib import Path

import pytest

from caption_train.config.captioning import CaptionOptions
from caption_train.config.compiling import CompileOptions
from caption_train.config.training import TrainOptions

TRAIN = {"dataset_dir": Path("data"), "output_dir": Path("out"), "model_id": "base"}


@pytest.mark.parametrize(
    ("options_class", "needed"),
    [
        (TrainOptions, TRAIN),
        (CaptionOptions, {"images": ["a"]}),
        (CompileOptions, {"dataset_dir": Path("a")}),
    ],
)
def test_defaults_are_fine_and_what_is_required_is_named(options_class, needed):
    assert options_class(**needed).check() == []
    problems = options_class().check()
    assert problems and all("required" in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"rank": 0}, "--rank"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": -1}, "--batch_size"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"learning_rate": float("nan")}, "--learning_rate"),
        ({"dropout": 1.0}, "--dropout"),
        ({"caption_dropout": -0.1}, "--caption_dropout"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm"),
        ({"save_every_n_steps": 0}, "--save_every_n_steps"),
        ({"train_parts": ["eyes"]}, "--train_parts eyes"),
        ({"part_learning_rates": ["eyes=1e-5"]}, "--part_learning_rates eyes=1e-5: write PART=RATE"),
        ({"part_learning_rates": ["vision"]}, "--part_learning_rates vision: the rate must be a number"),
        ({"part_learning_rates": ["vision=0"]}, "--part_learning_rates vision=0: the rate must be a number"),
        ({"part_learning_rates": ["vision=nan"]}, "the rate must be a number above 0"),
        ({"part_learning_rates": ["vision=1", "vision=2"]}, "vision=2: vision has a rate already"),
        (
            {"part_learning_rates": ["vision=1"], "train_parts": ["language"]},
            "vision is frozen; add it to --train_parts",
        ),
        ({"keep_tokens": 1}, "--keep_tokens"),
        ({"prompt": "a", "task": "b"}, "--prompt and --task"),
        ({"quantize_parts": ["vision"]}, "--quantize_parts"),
        ({"accumulation_compression": True}, "--accumulation_compression"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"name": "a/b"}, "--name"),
        ({"weight_decay": -1.0}, "--weight_decay"),
        ({"max_pixels": 0}, "--max_pixels"),
    ],
)
def test_a_training_option_that_cannot_work_is_named_once(changes, flag):
    problems = TrainOptions(**TRAIN, **changes).check()
    assert len(problems) == 1 and flag in problems[0] and "\n" not in problems[0]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"beams": 0}, "--beams"),
        ({"top_p": 0.0, "temperature": 1.0}, "--top_p"),
        ({"top_p": 0.5}, "--temperature"),
        ({"temperature": 1.0, "beams": 4}, "--beams"),
        ({"caption_extension": "a/b"}, "--caption_extension"),
        ({"output": Path("a.xml")}, "--output"),
        ({"prompt": "a", "task": "b"}, "--prompt and --task"),
    ],
)
def test_a_captioning_option_that_cannot_work_is_named(changes, flag):
    problems = CaptionOptions(images=["a"], **changes).check()
    assert len(problems) == 1 and flag in problems[0]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"validation_split": 1.0}, "--validation_split"),
        ({"caption_extension": [".png"]}, "--caption_extension .png"),
        ({"encoding": "klingon"}, "--encoding"),
    ],
)
def test_a_compiling_option_that_cannot_work_is_named(changes, flag):
    problems = CompileOptions(dataset_dir=Path("a"), **changes).check()
    assert len(problems) == 1 and flag in problems[0]


def test_every_problem_is_reported():
    options = TrainOptions(**TRAIN, rank=0, epochs=0, dropout=2.0)
    assert len(options.check()) == 3


def test_lists_are_not_shared_between_options():
    TrainOptions(**TRAIN).caption_extension.append("x")
    assert TrainOptions(**TRAIN).caption_extension == [".txt"]

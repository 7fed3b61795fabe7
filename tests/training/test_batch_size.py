"""Batches that do not fit into memory."""

import errno

import pytest
import torch

from caption_train.config.training import TrainOptions
from caption_train.data.pairs import Pair
from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.training import prepare
from caption_train.training.batch_size import is_out_of_memory
from caption_train.training.failures import explain_out_of_memory
from caption_train.training.loop import Trainer
from caption_train.training.optim.state_size import count_state, find_embeddings
from caption_train.training.run.data import TrainingData
from tests.fixtures.forked import start
from tests.fixtures.runs import assert_same_run, prepare_run, train

PAIRS, RUN = 12, {"epochs": 1}


@pytest.fixture
def two_images_at_most(monkeypatch):
    """Make a forward pass of more than two images run out of memory."""
    from transformers import BlipForConditionalGeneration

    forward = BlipForConditionalGeneration.forward

    def limited(self, pixel_values, **inputs):
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixel_values=pixel_values, **inputs)

    monkeypatch.setattr(BlipForConditionalGeneration, "forward", limited)


def test_a_batch_is_made_to_fit_and_the_effective_batch_stays(make, two_images_at_most, capsys):
    trainer = prepare_run(make(batch_size=6, auto_batch_size=True), get_family("blip"))
    plan = trainer.run.plan
    # 6, then 3, then 1: the divisors of six.
    assert (plan.batch_size, plan.accumulation_steps, plan.effective_batch_size) == (1, 6, 6)
    words = capsys.readouterr().err
    assert "1 images × 6 micro-batches (out of memory with 6, 3 images)" in words and "peak" in words


def test_a_fitted_run_is_the_run_that_was_started_so(make, two_images_at_most, tmp_path):
    train("blip", make("fitted", batch_size=4, auto_batch_size=True, dropout=0.1))
    train("blip", make("asked", batch_size=2, gradient_accumulation_steps=2, dropout=0.1))
    assert_same_run(tmp_path / "fitted", tmp_path / "asked")


def test_a_resumed_run_keeps_the_batch_that_fitted(make, two_images_at_most):
    train("blip", make(batch_size=4, auto_batch_size=True))
    resumed = prepare_run(
        make(batch_size=4, auto_batch_size=True, epochs=2, resume="auto"), get_family("blip")
    )
    assert resumed.run.plan.batch_size == 2


def test_the_step_that_is_tried_has_the_longest_captions_on_the_largest_images(tmp_path):
    sizes = {"a": 10, "bb": 30, "ccc": 20}
    pairs = [Pair(tmp_path / name, name, "") for name in sizes]
    data = TrainingData(pairs, pixels={tmp_path / name: size for name, size in sizes.items()})
    worst = [(pair.image.name, pair.caption) for pair in data.find_worst(2)]
    assert worst == [("bb", "ccc"), ("ccc", "bb")]


def test_without_the_flag_a_want_of_memory_says_what_helps(make, two_images_at_most):
    with pytest.raises(CaptionTrainError) as error:
        train("blip", make(batch_size=4))
    message = str(error.value)
    assert "--batch_size 4" in message and "--auto_batch_size" in message
    assert "--gradient_checkpointing" in message and "\n" not in message


def test_a_machine_without_memory_left_is_told_in_one_line(make, tmp_path):
    log = tmp_path / "log"

    def work() -> None:
        # Four terabytes, which no allocator gives.
        Trainer.update = lambda self, micro_batches: torch.empty(2**40)
        train("blip", make())

    assert start(work, log).wait() == 1, log.read_text()
    assert "out of memory with --batch_size 2" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_only_a_want_of_memory_is_called_one():
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert is_out_of_memory(
        RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)")
    )
    assert not is_out_of_memory(OSError(errno.ENOENT, "No such file"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(TrainOptions(), None):
        raise RuntimeError("shapes do not match")


FLORA = {"optimizer_name": "Flora", "optimizer_rank": 2}


@pytest.mark.parametrize("changes", [{}, FLORA, {**FLORA, "accumulation_compression": True}])
def test_measuring_leaves_the_run_as_it_was(make, tmp_path, monkeypatch, capsys, changes):
    train("blip", make("measured", dropout=0.1, **changes))
    assert "a step of the 2 largest images with the longest captions: peak" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "fit_batch_size", lambda options, *arguments: options)
    train("blip", make("not measured", dropout=0.1, **changes))
    assert_same_run(tmp_path / "measured", tmp_path / "not measured")


@pytest.mark.parametrize("changes", [{}, {"optimizer_name": "AdamW8bit"}, FLORA])
def test_a_trial_makes_room_for_the_state_its_optimizer_has(make, monkeypatch, changes):
    rooms, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: rooms.append(a[0]) or empty(*a, **k))
    run = prepare_run(make(train_method="full", **changes), get_family("blip")).run
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert count_state(run.options, trained, find_embeddings(run.model)) in rooms

"""Runs that are killed, signalled, and resumed."""

import os
import signal
from pathlib import Path

import pytest
import torch
from forked import start
from safetensors.torch import load_file
from tiny_runs import make_options, read_log, save_base, train, write_pairs

from caption_train import checkpoint, saving
from caption_train.training import Trainer

HARD = {
    "dropout": 0.1,
    "shuffle_captions": True,
    "caption_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "save_every_n_steps": 2,
}
OPTIMIZERS = {
    "AdamW with workers": {"num_workers": 2},
    "AdamW8bit": {"optimizer_name": "AdamW8bit", "target_modules": ["mlp.fc1", "mlp.fc2"]},
    "Flora": {"optimizer_name": "Flora", "optimizer_rank": 2},
    "FloraAccelerator": {
        "optimizer_name": "Flora",
        "optimizer_rank": 2,
        "accumulation_compression": True,
        "accumulation_rank": 2,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("blip", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 10)


@pytest.fixture
def make(base, pairs, tmp_path):
    def make(output="out", **changes):
        return make_options("blip", base, pairs, tmp_path / output, **changes)

    return make


def die_at(moment: str, count: int) -> None:
    """Have this process killed with -9 the next `count`th time it comes to a moment."""
    targets = {
        "after the gradient": (Trainer, "_step"),
        "writing a file": (saving, "write_state"),
        "between files": (checkpoint, "sync_folder"),
        "before the pointer": (checkpoint, "point"),
    }
    owner, name = targets[moment]
    function, calls = getattr(owner, name), iter(range(count - 1))

    def die(*arguments, **settings):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)

    setattr(owner, name, die)


def read_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert read_log(one) == read_log(other)
    weights, others = read_weights(one), read_weights(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def kill_and_resume(options, moments, log: Path) -> None:
    """Train `options` through a kill at each of the moments to the end."""
    for moment in moments:

        def work(moment=moment):
            die_at(*moment)
            train("blip", options)

        assert start(work, log).wait() == -signal.SIGKILL, log.read_text()
        options.resume = "auto"
    assert start(lambda: train("blip", options), log).wait() == 0, log.read_text()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_killed_three_times_ends_with_the_same_bits(name, make, tmp_path):
    changes = {**HARD, **OPTIMIZERS[name]}
    log = tmp_path / "log"
    assert start(lambda: train("blip", make("whole", **changes)), log).wait() == 0, log.read_text()
    moments = [("after the gradient", 2), ("writing a file", 2), ("before the pointer", 1)]
    kill_and_resume(make("killed", **changes), moments, log)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".partial-*"))

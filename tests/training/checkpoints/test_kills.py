"""Runs killed with -9 and resumed again and again equal a run that was never interrupted."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.forked import start, start_ranks
from tests.fixtures.kills import HARD, die_at
from tests.fixtures.runs import assert_same_run, make_options, train

OPTIMIZERS = {
    "AdamW with workers": {"num_workers": 2},
    "every weight": {"train_method": "full", "learning_rate": 1e-4},
    "AdamW8bit": {"optimizer_name": "AdamW8bit", "target_modules": ["mlp.fc1", "mlp.fc2"]},
    "Flora": {"optimizer_name": "Flora", "optimizer_rank": 2},
    "FloraAccelerator": {
        "optimizer_name": "Flora",
        "optimizer_rank": 2,
        "accumulation_compression": True,
        "accumulation_rank": 2,
    },
}


MOMENTS = [("after the gradient", 2), ("writing a file", 2), ("before the pointer", 1)]


def kill_and_resume(options, moments, log: Path, family: str = "blip") -> None:
    """Train `options` through a kill at each of the moments to the end."""
    for moment in moments:

        def work(moment=moment, options=options):
            die_at(*moment)
            train(family, options)

        assert start(work, log).wait() == -signal.SIGKILL, log.read_text()
        options = replace(options, resume="auto")
    assert start(lambda: train(family, options), log).wait() == 0, log.read_text()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_killed_three_times_ends_with_the_same_bits(name, make, tmp_path):
    changes = {**HARD, **OPTIMIZERS[name]}
    log = tmp_path / "log"
    assert start(lambda: train("blip", make("whole", **changes)), log).wait() == 0, log.read_text()
    kill_and_resume(make("killed", **changes), MOMENTS, log)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".partial-*"))


def test_a_run_with_flat_pixels_killed_three_times_ends_with_the_same_bits(tiny_base, pairs, tmp_path):
    changes = {**HARD, "train_parts": ["vision", "language"], "num_workers": 1}
    log = tmp_path / "log"

    def make(output: str):
        return make_options("vlm", tiny_base("vlm/qwen3_vl"), pairs, tmp_path / output, **changes)

    assert start(lambda: train("vlm", make("whole")), log).wait() == 0, log.read_text()
    kill_and_resume(make("killed"), MOMENTS, log, "vlm")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_killed_together_end_with_the_same_bits(make, tmp_path):
    changes = {**HARD, "epochs": 1, "save_every_n_steps": 1}
    log = tmp_path / "log"

    def work(output: str, moment=None, **more) -> None:
        if moment is not None:
            die_at(*moment)
        train("blip", make(output, **changes, **more))

    ranks = start_ranks(2, lambda: work("whole"), log)
    assert [rank.wait() for rank in ranks] == [0, 0], log.read_text()
    ranks = start_ranks(2, lambda: work("killed", ("after the gradient", 2)), log)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2, log.read_text()
    ranks = start_ranks(2, lambda: work("killed", resume="auto"), log)
    assert [rank.wait() for rank in ranks] == [0, 0], log.read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    ranks = start_ranks(1, lambda: work("killed", resume="auto"), log)
    assert [rank.wait() for rank in ranks] == [2]
    assert "saved by 2 processes, this run has 1" in log.read_text()

"""Training with two gloo processes equals training with one."""

import pytest

from tests.fixtures.forked import start_ranks
from tests.fixtures.runs import make_options, read_log, save_base, train, write_pairs


@pytest.mark.parametrize("family", ["blip", "florence"])
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(family, tmp_path):
    # Ten images in batches of four: the last batch leaves the second process nothing to do.
    pairs, base = write_pairs(tmp_path / "pairs", 10), save_base(family, tmp_path / "base")
    together = make_options(family, base, pairs, tmp_path / "two", epochs=1)
    ranks = start_ranks(2, lambda: train(family, together), tmp_path / "log")
    assert [rank.wait() for rank in ranks] == [0, 0], (tmp_path / "log").read_text()
    train(family, make_options(family, base, pairs, tmp_path / "one", batch_size=4, epochs=1))
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)

"""`--group_by_length`: an epoch stays a permutation, whatever cuts its batches, and padding becomes less."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from caption_train.config.compatibility import check
from caption_train.data.pairs import Pair
from caption_train.families import get_family
from caption_train.training.run.batch_plan import BatchPlan
from caption_train.training.run.data import TrainingData
from caption_train.training.run.lengths import describe_padding, measure_lengths
from tests.fixtures.runs import assert_same_run, make_options, prepare_run, read_log, train, write_pairs

LENGTHS = random.Random(0).choices([3, 10, 40, 200], k=1003)


def make_plan(**changes) -> BatchPlan:
    return BatchPlan(**{"num_samples": len(LENGTHS), "batch_size": 4, "lengths": LENGTHS} | changes)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (8, 2, 3)]
)
def test_an_epoch_stays_a_permutation_and_epochs_differ(batch_size, accumulation, processes):
    plans = [
        make_plan(batch_size=batch_size, accumulation_steps=accumulation, num_processes=processes,
                  process_index=rank, epochs=2)
        for rank in range(processes)
    ]  # fmt: skip
    read = [key for plan in plans for batch in plan for key in batch]
    assert sorted(read) == [(epoch, index) for epoch in (1, 2) for index in range(len(LENGTHS))]
    orders = [[index for e, index in read if e == epoch] for epoch in (1, 2)]
    assert orders[0] != orders[1]


def test_an_optimizer_step_has_the_same_samples_however_it_is_cut():
    def steps(**changes):
        ranks = [make_plan(process_index=r, **changes) for r in range(changes.get("num_processes", 1))]
        return [
            sorted(key for plan in ranks for batch in plan.micro_batches(step) for key in batch)
            for step in range(ranks[0].total_steps)
        ]

    whole = steps(batch_size=8)
    assert whole == steps(batch_size=2, accumulation_steps=4) == steps(batch_size=2, num_processes=4)
    assert whole == steps(batch_size=4, accumulation_steps=1, num_processes=2)


def test_a_plan_that_starts_later_goes_on_as_the_whole_one():
    whole = [make_plan(epochs=2).micro_batches(step) for step in range(make_plan(epochs=2).total_steps)]
    assert list(make_plan(epochs=2, first_step=100)) == [batch for step in whole[100:] for batch in step]


def test_batches_have_less_padding_and_no_order_of_length():
    plan = make_plan()
    grouped, plain = plan.measure_padding(LENGTHS), replace(plan, lengths=None).measure_padding(LENGTHS)
    assert grouped < plain / 5
    assert describe_padding(plan) == (
        f"--group_by_length: {grouped:.1%} of the tokens in batches are padding, {plain:.1%} without it"
    )
    longest = [max(LENGTHS[index] for _, index in batch) for batch in plan]
    pairs = list(pairwise(longest))
    assert 0.2 < sum(a < b for a, b in pairs) / len(pairs) < 0.6


def test_without_the_flag_nothing_is_sorted():
    assert list(make_plan(lengths=None)) == list(BatchPlan(num_samples=len(LENGTHS), batch_size=4))


def test_a_run_ends_as_the_one_that_was_stopped_and_pads_less(base, tmp_path, capsys):
    options = make_options("blip", base, write_pairs(tmp_path / "pairs", 9), tmp_path / "whole")
    options = replace(options, group_by_length=True, save_every_n_steps=3)
    train("blip", options)
    assert "% of the tokens in batches are padding" in capsys.readouterr().err
    trainer = prepare_run(replace(options, output_dir=tmp_path / "cut"), get_family("blip"))

    def stop(step):
        if step == 6:
            raise KeyboardInterrupt

    trainer.sampler.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    train("blip", replace(options, output_dir=tmp_path / "cut", resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    plain = replace(options, group_by_length=False, output_dir=tmp_path / "plain")
    train("blip", plain)
    assert read_log(tmp_path / "plain") != read_log(tmp_path / "whole") and not check(options)


def test_images_count_where_larger_ones_have_more_tokens(tiny_base, tmp_path):
    family = get_family("vlm")
    processor = family.load_text_processor(str(tiny_base("vlm/qwen3_vl")))
    family.configure(processor, {"max_pixels": None})
    paths = [tmp_path / name for name in ("small", "large")]
    pairs = [Pair(path, "a cat", path.name) for path in paths]
    data = TrainingData(pairs, pixels=dict(zip(paths, (64 * 64, 2000 * 2000), strict=True)))
    options = make_options("blip", tmp_path, tmp_path, tmp_path)
    small, large = measure_lengths(family, processor, data, options)
    assert large > small > 5

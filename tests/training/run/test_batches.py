"""Which process reads which samples at which step, and how items become a batch."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from caption_train.data.pairs import Pair
from caption_train.families.labels import IGNORE_INDEX
from caption_train.training.run.batch_plan import BatchPlan
from caption_train.training.run.batches import CaptionDataset, Collate, make_train_dataloader

SHAPES = {
    "num_samples": st.integers(1, 40),
    "batch_size": st.integers(1, 5),
    "accumulation_steps": st.integers(1, 4),
    "num_processes": st.integers(1, 4),
    "seed": st.integers(0, 3),
}


def make_plans(**shape) -> list[BatchPlan]:
    return [BatchPlan(process_index=rank, epochs=2, **shape) for rank in range(shape["num_processes"])]


def collate_numbers(items) -> dict:
    """Stand in for a family's collator: the label is the length of the caption."""
    return {"labels": torch.tensor([[len(item["caption"]) or IGNORE_INDEX] for item in items])}


@given(**SHAPES)
@settings(max_examples=200, deadline=None)
def test_every_sample_is_read_once_an_epoch_whatever_the_shape(**shape):
    plans = make_plans(**shape)
    for epoch in (1, 2):
        steps = range((epoch - 1) * plans[0].steps_per_epoch, epoch * plans[0].steps_per_epoch)
        read = [key for plan in plans for step in steps for m in plan.micro_batches(step) for key in m]
        assert sorted(read) == [(epoch, index) for index in range(shape["num_samples"])]


@given(**SHAPES)
@settings(max_examples=200, deadline=None)
def test_processes_take_the_same_number_of_micro_batches_and_none_is_too_large(**shape):
    plans = make_plans(**shape)
    for step in range(plans[0].total_steps):
        micro_batches = [plan.micro_batches(step) for plan in plans]
        assert len({len(m) for m in micro_batches}) == 1
        assert 1 <= len(micro_batches[0]) <= shape["accumulation_steps"]
        assert all(len(m) <= shape["batch_size"] for plan in micro_batches for m in plan)


@given(
    num_samples=st.integers(1, 40),
    size=st.sampled_from([1, 2, 4, 6, 8, 12]),
    seed=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_an_effective_batch_holds_the_same_samples_however_it_is_shared_out(num_samples, size, seed, data):
    whole = BatchPlan(num_samples, batch_size=size, epochs=2, seed=seed)
    ranks = data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if size % n == 0]))
    steps = data.draw(st.sampled_from([n for n in (1, 2, 3) if (size // ranks) % n == 0]))
    shape = {"batch_size": size // ranks // steps, "accumulation_steps": steps, "num_processes": ranks}
    plans = make_plans(num_samples=num_samples, seed=seed, **shape)
    assert plans[0].total_steps == whole.total_steps
    for step in range(whole.total_steps):
        shared = [key for plan in plans for m in plan.micro_batches(step) for key in m]
        assert sorted(shared) == sorted(key for m in whole.micro_batches(step) for key in m)


@given(**SHAPES, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_resumed_plan_is_the_rest_of_the_whole_one_and_knows_its_length(data, **shape):
    for plan in make_plans(**shape):
        everything = list(plan)
        assert len(everything) == len(plan)
        first_step = data.draw(st.integers(0, plan.total_steps))
        done = sum(len(plan.micro_batches(step)) for step in range(first_step))
        plan.first_step = first_step
        assert list(plan) == everything[done:]
        assert len(plan) == len(everything) - done


def test_epochs_differ_in_order_and_seeds_do_too():
    plan, other = BatchPlan(20, epochs=2), BatchPlan(20, epochs=2, seed=1)
    first, second = (
        [index for step in range(20 * e, 20 * e + 20) for [(_, index)] in plan.micro_batches(step)]
        for e in (0, 1)
    )
    assert first != second
    assert first != [index for step in range(20) for [(_, index)] in other.micro_batches(step)]


def test_epochs_are_the_permutations_of_earlier_versions():
    plan = BatchPlan(num_samples=12, batch_size=12, epochs=2, seed=7)
    first, second = ([index for _, index in batch] for batch in plan)
    assert first == [1, 11, 4, 9, 3, 2, 7, 5, 8, 6, 0, 10]
    assert second == [9, 0, 3, 2, 6, 8, 11, 1, 7, 10, 5, 4]


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_each_epoch_is_shuffled_once_however_far_the_loader_reads_ahead(ahead, monkeypatch):
    shuffles, shuffle = [], random.Random.shuffle
    monkeypatch.setattr(random.Random, "shuffle", lambda rng, x: shuffles.append(len(x)) or shuffle(rng, x))
    plan = BatchPlan(10, epochs=4)
    loader, read = iter(plan), []
    for step in range(plan.total_steps):
        read += list(itertools.islice(loader, step + 1 + ahead - len(read)))
        assert plan.micro_batches(step) == [read[step]]
    assert shuffles == [10] * 4


@pytest.fixture
def pairs(tmp_path):
    for index in range(6):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / f"{index}.png")
    return [Pair(tmp_path / f"{i}.png", "style, red, blue, green, round", f"{i}.txt") for i in range(6)]


def test_shuffled_captions_keep_their_first_tags_and_depend_on_epoch_and_index_alone(pairs):
    dataset = CaptionDataset(pairs, seed=1, shuffle_captions=True, keep_tokens=1)
    captions = [dataset.caption(epoch, 0) for epoch in range(1, 20)]
    assert captions == [dataset.caption(epoch, 0) for epoch in range(1, 20)]
    assert len(set(captions)) > 5
    for caption in captions:
        tags = caption.split(", ")
        assert tags[0] == "style" and sorted(tags[1:]) == ["blue", "green", "red", "round"]


def test_captions_are_dropped_about_as_often_as_asked(pairs):
    dataset = CaptionDataset(pairs, caption_dropout=0.25)
    dropped = sum(dataset.caption(epoch, 0) == "" for epoch in range(2000))
    assert dropped / 2000 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2000))


def test_a_file_that_breaks_during_training_is_left_out_and_named(pairs):
    pairs[1].image.write_bytes(b"")
    pairs[2].image.unlink()
    dataset = CaptionDataset(pairs)
    batch = Collate(collate_numbers)([dataset[1, index] for index in range(4)])
    assert batch.files == [str(pairs[0].image), str(pairs[3].image)]
    assert [error.split(": ")[0] for error in batch.errors] == [str(pairs[1].image), str(pairs[2].image)]
    assert batch.label_tokens == 2


def test_a_batch_of_broken_files_only_is_a_filler_that_weighs_nothing(pairs):
    for pair in pairs:
        pair.image.write_bytes(b"not an image")
    dataset = CaptionDataset(pairs)
    batch = Collate(collate_numbers)([dataset[1, index] for index in range(2)])
    assert batch.label_tokens == 0 and batch.files == [] and len(batch.errors) == 2
    assert len(batch.inputs["labels"]) == 1


def test_workers_read_what_one_process_reads_and_draw_no_random_numbers(pairs):
    dataset = CaptionDataset(pairs, shuffle_captions=True)
    read = {}
    for workers in (0, 2):
        loader = make_train_dataloader(
            dataset, BatchPlan(6, batch_size=2, epochs=2), collate_numbers, num_workers=workers
        )
        before = torch.get_rng_state()
        read[workers] = [batch.files for batch in loader]
        assert torch.equal(torch.get_rng_state(), before)
    assert read[0] == read[2] and len(read[0]) == 6

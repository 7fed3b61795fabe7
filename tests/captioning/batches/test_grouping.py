"""--group_by_length: other batches, the same captions in the same order."""

import pytest
from PIL import Image

from caption_train.adapters.record import resolve_base
from caption_train.captioning.batches import grouping
from caption_train.captioning.batches.grouping import in_first_order, order_by_length
from caption_train.captioning.engines.local import LocalEngine
from caption_train.captioning.prompts import Task
from caption_train.config.captioning import CaptionOptions
from caption_train.families import get_family
from caption_train.system.processes import Processes
from tests.fixtures.vlm import save_vlm


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model whose images have more tokens the larger they are."""
    return save_vlm("qwen3_vl", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder, tasks = tmp_path_factory.mktemp("images"), []
    for number in range(8):
        path, side = folder / f"{number}.png", 64 if number % 2 else 320
        Image.effect_noise((side, side), 80).convert("RGB").save(path)
        tasks.append(Task(path, "Describe this picture." if number == 5 else "Describe."))
    tasks[3].image.write_bytes(b"damaged")
    return tasks


def caption(base, tasks, monkeypatch, **options):
    family, shapes = get_family("vlm"), []
    encode = type(family).encode

    def note(family, processor, images, prompts):
        batch = encode(family, processor, images, prompts)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(type(family), "encode", note)
    settings = {"images": ["."], "batch_size": 2, "num_workers": 0, "max_token_length": 6, "device": "cpu"}
    options = CaptionOptions(**settings | options)
    engine = LocalEngine(
        family, resolve_base(family, str(base), None, "Describe.", None), options, Processes()
    )
    engine.open()
    shapes.clear()
    results = [getattr(result, "generated", result) for result in engine.caption(tasks)]
    monkeypatch.undo()
    return results, shapes


def test_captions_are_the_same_in_the_same_order_with_less_padding(base, tasks, monkeypatch):
    plain, padded = caption(base, tasks, monkeypatch)
    grouped, packed = caption(base, tasks, monkeypatch, group_by_length=True)
    assert grouped == plain
    assert "damaged" not in str(plain[0]) and "3.png" in plain[3].reason
    assert sum(rows * length for rows, length in packed) < sum(rows * length for rows, length in padded)


def test_a_caption_waits_for_those_of_its_window_only(tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "WINDOW", 2)
    family = get_family("blip")
    processor = family.load("examples/bases/blip-tiny")[1]
    prompts = ["a", "a red circle", "a", "a red", "a", "a red circle"]
    tasks = [Task(tmp_path / f"{number}.png", prompt) for number, prompt in enumerate(prompts)]
    order = order_by_length(family, processor, tasks, 2)
    assert order == [1, 3, 0, 2, 5, 4]
    taken = []
    results = in_first_order((taken.append(place) or place for place in order), order)
    assert [next(results), taken] == [0, [1, 3, 0]]
    assert list(results) == [1, 2, 3, 4, 5]

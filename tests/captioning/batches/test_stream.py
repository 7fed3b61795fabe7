"""Captions of what comes one after the other: what it is read from may take its time."""

import time
from collections import deque
from pathlib import Path

import pytest
import torch

from caption_train.captioning.batches.size import BatchSize
from caption_train.captioning.batches.stream import _Batches
from caption_train.captioning.prompts import Task
from caption_train.system.signals import NoAnswer, limiting_wait


def come_slowly():
    for number in range(4):
        time.sleep(0.15)
        yield Task(Path(f"{number}.png"), "")


def test_the_fetch_of_a_shard_does_not_count_as_a_silent_worker():
    waiting = deque()
    with limiting_wait(0.2):
        batches = iter(_Batches(come_slowly(), BatchSize(2, torch.device("cpu")), waiting))
        assert [len(next(batches)), len(next(batches))] == [2, 2]
        assert len(waiting) == 4
        with pytest.raises(NoAnswer):
            time.sleep(2)

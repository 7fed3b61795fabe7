"""Padding, against literal tensors."""

import torch

from caption_train.families.labels import IGNORE_INDEX, count_label_tokens, pad_labels
from caption_train.system.devices import model_dtype, move_batch


def test_labels_are_padded_right_with_what_the_loss_ignores():
    assert IGNORE_INDEX == torch.nn.CrossEntropyLoss().ignore_index == -100
    expected = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert torch.equal(pad_labels([[5, 6, 7], [8]]), expected)
    assert pad_labels([[1]]).dtype == torch.long


def test_counting_leaves_out_what_is_ignored_and_nothing_else():
    assert count_label_tokens(torch.tensor([[0, 1, -100], [-100, -100, -100]])) == 2


def test_moving_changes_the_type_of_pixels_only():
    batch = {"pixel_values": torch.zeros(1, 3, 2, 2), "input_ids": torch.tensor([[7]])}
    moved = move_batch(batch, torch.device("cpu"), torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["input_ids"].dtype == torch.long and moved["input_ids"].item() == 7
    assert batch["pixel_values"].dtype == torch.float32


def test_a_models_type_is_that_of_its_floating_point_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).half())
    model[0].register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), False))
    assert model_dtype(model) == torch.float16

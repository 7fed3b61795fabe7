"""What depends on the device: workers, tensor cores."""

import os

import pytest
import torch

from caption_train.system.devices import use_tensor_cores
from caption_train.system.workers import default_workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [(CPU, 16, 1, 0), (GPU, 16, 1, 4), (GPU, 16, 8, 1), (GPU, 3, 1, 2), (GPU, 1, 1, 0), (GPU, 2, 8, 0)],
)
def test_a_gpu_gets_workers_where_none_are_asked_for(device, cores, processes, workers, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_workers(device, processes) == workers


def test_float32_uses_tensor_cores_on_a_gpu_only():
    before = torch.get_float32_matmul_precision()
    try:
        use_tensor_cores(CPU)
        assert torch.get_float32_matmul_precision() == before
        use_tensor_cores(GPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)

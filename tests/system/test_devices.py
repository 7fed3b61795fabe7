"""What depends on the device: workers, tensor cores."""

import os

import pytest
import torch

from caption_train.system import devices
from caption_train.system.devices import choose_precision, use_tensor_cores
from caption_train.system.workers import choose_workers, default_workers

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


@pytest.mark.parametrize(
    ("device", "cores", "processes", "megapixels", "workers"),
    [
        *[(CPU, 2, 1, 12, 1), (CPU, 16, 1, 0.3, 0), (CPU, 1, 1, 12, 0), (CPU, 8, 8, 12, 0)],
        *[(GPU, 16, 1, 0.2, 1), (GPU, 16, 1, 1, 4), (GPU, 16, 1, 12, 15), (GPU, 16, 4, 12, 3)],
        *[(GPU, 64, 1, 12, 16), (GPU, 1, 1, 12, 0)],
    ],
)
def test_auto_workers_go_by_cores_and_images(device, cores, processes, megapixels, workers, monkeypatch):
    monkeypatch.setattr("caption_train.system.workers.count_cores", lambda: cores)
    assert choose_workers(device, megapixels, processes) == workers


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_where_the_device_has_it(has, precision, monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: has)
    found, reason = choose_precision(CPU)
    assert found == precision and "cpu" in reason
    assert choose_precision(torch.device("mps"))[0] == "no"


def test_bfloat16_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__",
        lambda a, b: real(a, b) * (2 if a.dtype == torch.bfloat16 else 1),
    )  # fmt: skip
    assert choose_precision(CPU) == ("no", "cpu computes something else in bfloat16")

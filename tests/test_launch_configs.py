"""The configurations in examples/accelerate, as accelerate's own launcher reads them."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from caption_train import sharding
from tests.conftest import REPOSITORY

CONFIGS = {path.name: path for path in (REPOSITORY / "examples" / "accelerate").iterdir()}
CLAIMS = {
    "one_gpu.yaml": {"num_processes": 1, "num_machines": 1, "multi_gpu": False, "use_fsdp": False},
    "multi_gpu.yaml": {"num_processes": 2, "num_machines": 1, "multi_gpu": True, "use_fsdp": False},
    "two_machines.yaml": {"num_processes": 8, "num_machines": 2, "multi_gpu": True, "use_fsdp": False},
    "fsdp.yaml": {"num_processes": 2, "num_machines": 1, "multi_gpu": False, "use_fsdp": True},
}


def read(name: str, *flags: str):
    """Return the launcher's arguments as the file sets them."""
    arguments = ["--config_file", str(CONFIGS[name]), *flags, "train_florence_lora.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_every_configuration_has_its_claim():
    assert CONFIGS.keys() == CLAIMS.keys()


@pytest.mark.parametrize("name", CLAIMS)
def test_a_configuration_selects_what_it_claims(name):
    chosen = read(name)
    assert {key: getattr(chosen, key) for key in CLAIMS[name]} == CLAIMS[name]
    assert chosen.mixed_precision == "bf16" and not chosen.use_deepspeed
    assert f"--config_file examples/accelerate/{name}" in CONFIGS[name].read_text("utf-8")


def test_the_second_machine_is_told_by_its_rank():
    chosen = read("two_machines.yaml", "--machine_rank", "1")
    prepare_multi_gpu_env(chosen)
    assert (chosen.node_rank, chosen.nnodes, chosen.nproc_per_node) == (1, "2", "4")
    assert chosen.rdzv_endpoint == "10.0.0.1:29500"


def test_the_run_heeds_all_that_the_sharding_configuration_sets(monkeypatch):
    for name, value in prepare_multi_gpu_env(read("fsdp.yaml")).items():
        monkeypatch.setenv(name, value)
    assert sharding.find_unsupported() == []

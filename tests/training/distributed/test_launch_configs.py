"""The configurations in examples/accelerate, as accelerate's own launcher reads and starts them."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import sys
from functools import partial

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from caption_train.system.launcher import asks_for
from caption_train.training.distributed import deepspeed, fsdp
from tests.fixtures.forked import start
from tests.fixtures.paths import REPOSITORY

CONFIGS = {path.name: path for path in (REPOSITORY / "examples" / "accelerate").iterdir()}
CLAIMS = {
    "one_gpu.yaml": {"num_processes": 1, "num_machines": 1, "multi_gpu": False, "use_fsdp": False},
    "multi_gpu.yaml": {"num_processes": 2, "num_machines": 1, "multi_gpu": True, "use_fsdp": False},
    "two_machines.yaml": {"num_processes": 8, "num_machines": 2, "multi_gpu": True, "use_fsdp": False},
    "fsdp.yaml": {"num_processes": 2, "num_machines": 1, "multi_gpu": False, "use_fsdp": True},
    "deepspeed.yaml": {"num_processes": 2, "num_machines": 1, "use_fsdp": False, "use_deepspeed": True},
}


def read(name: str, *flags: str):
    """Return the launcher's arguments as the file sets them."""
    arguments = ["--config_file", str(CONFIGS[name]), *flags, "train_florence_lora.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def prepare_deepspeed(chosen) -> dict[str, str]:
    """Return the environment that accelerate starts processes in for DeepSpeed."""
    chosen.deepspeed_fields_from_accelerate_config = "zero_stage"
    return prepare_deepspeed_cmd_env(chosen)[1]


def test_every_configuration_has_its_claim():
    assert CONFIGS.keys() == CLAIMS.keys()


@pytest.mark.parametrize("name", CLAIMS)
def test_a_configuration_selects_what_it_claims(name):
    chosen = read(name)
    assert {key: getattr(chosen, key) for key in CLAIMS[name]} == CLAIMS[name]
    assert chosen.mixed_precision == "bf16" and chosen.use_deepspeed == (name == "deepspeed.yaml")
    assert f"--config_file examples/accelerate/{name}" in CONFIGS[name].read_text("utf-8")


def test_the_second_machine_is_told_by_its_rank():
    chosen = read("two_machines.yaml", "--machine_rank", "1")
    prepare_multi_gpu_env(chosen)
    assert (chosen.node_rank, chosen.nnodes, chosen.nproc_per_node) == (1, "2", "4")
    assert chosen.rdzv_endpoint == "10.0.0.1:29500"


@pytest.mark.parametrize(
    ("name", "prepare", "room"),
    [("fsdp.yaml", prepare_multi_gpu_env, fsdp), ("deepspeed.yaml", prepare_deepspeed, deepspeed)],
)
def test_the_run_heeds_all_that_the_sharding_configuration_sets(name, prepare, room, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable, value in prepare(read(name)).items():
        monkeypatch.setenv(variable, value)
    assert room.find_unsupported() == []
    assert asks_for("DEEPSPEED") == (room is deepspeed)


def find_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(name: str, rank: int, *script: str) -> None:
    """Do what `accelerate launch` does with a configuration, on this machine as number `rank`."""
    machines, processes = CLAIMS[name]["num_machines"], min(CLAIMS[name]["num_processes"], 2)
    flags = ["--config_file", str(CONFIGS[name])]
    if machines > 1:
        flags += ["--main_process_ip", "127.0.0.1", "--num_processes", str(processes)]
        flags += ["--machine_rank", str(rank)]
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = launch_command_parser().parse_args([*flags, *script])
    if name == "one_gpu.yaml":
        # One process: what it starts the script with is an environment.
        command, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(arguments)[0])
        os.environ |= environment
        sys.argv = command[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        launch_command(arguments)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_run_launched_with_a_configuration_trains_also_on_cpus(name, tmp_path):
    if name == "deepspeed.yaml" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: it is an extra")
    examples, data, output = REPOSITORY / "examples", tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for picture in sorted((examples / "shapes" / "train").iterdir())[:8]:
        shutil.copy(picture, data)
    script = ["--main_process_port", find_port(), str(REPOSITORY / "train_blip_network.py")]
    script += [str(data), str(output), "--model_id", str(examples / "bases" / "blip-tiny"), "--epochs", "1"]
    machines, processes = CLAIMS[name]["num_machines"], min(CLAIMS[name]["num_processes"], 2)
    logs = [tmp_path / f"log-{rank}" for rank in range(machines)]
    started = [start(partial(launch, name, rank, *script), log) for rank, log in enumerate(logs)]
    codes, words = [child.wait() for child in started], [log.read_text() for log in logs]
    assert codes == [0] * machines, "\n".join(words)
    way = {"fsdp.yaml": "FSDP", "deepspeed.yaml": "DeepSpeed"}.get(name)
    assert re.findall(r"sharded by (\w+)", words[0]) == ([way] if way else [])
    assert f"{processes} processes" in " ".join(words[0].split()) or processes == 1
    assert json.loads((output / "summary.json").read_text())["global_step"] == 4 // (2 * processes)

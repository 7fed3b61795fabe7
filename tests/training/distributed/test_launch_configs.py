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
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from caption_train.system.launcher import asks_for
from caption_train.training.distributed import deepspeed, fsdp
from tests.fixtures.forked import Child, start, start_ranks
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
    flags = ["--config_file", str(CONFIGS[name])]
    if CLAIMS[name]["num_machines"] > 1:
        flags += ["--main_process_ip", "127.0.0.1", "--num_processes", "2", "--machine_rank", str(rank)]
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch_command(launch_command_parser().parse_args([*flags, *script]))


def run_in_environment(name: str, *script: str) -> None:
    """Do what a process does that `accelerate launch` starts with a configuration."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), *script])
    chosen = _validate_launch_command(arguments)[0]
    if name == "one_gpu.yaml":
        os.environ |= prepare_simple_launcher_cmd_env(chosen)[1]
    else:
        os.environ |= prepare_multi_gpu_env(chosen)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.argv = [chosen.training_script, *chosen.training_script_args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start_all(name: str, script: list[str], folder: Path) -> list[Child]:
    """Start a run: by the launcher for FSDP and on two machines, else in forks, which saves the imports."""
    if name == "one_gpu.yaml":
        return [start(partial(run_in_environment, name, *script), folder / "log-0")]
    if name == "multi_gpu.yaml":
        return start_ranks(2, partial(run_in_environment, name, *script), folder / "log-0")
    machines = CLAIMS[name]["num_machines"]
    return [start(partial(launch, name, rank, *script), folder / f"log-{rank}") for rank in range(machines)]


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
    processes = min(CLAIMS[name]["num_processes"], 2)
    started = start_all(name, script, tmp_path)
    codes = [child.wait() for child in started]
    words = (tmp_path / "log-0").read_text()
    assert codes == [0] * len(started), "\n".join(child.log.read_text() for child in started)
    way = {"fsdp.yaml": "FSDP", "deepspeed.yaml": "DeepSpeed"}.get(name)
    assert re.findall(r"sharded by (\w+)", words) == ([way] if way else [])
    assert f"{processes} processes" in " ".join(words.split()) or processes == 1
    assert json.loads((output / "summary.json").read_text())["global_step"] == 4 // (2 * processes)

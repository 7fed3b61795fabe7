"""What docs/captioning.md shows works as shown; the shell scripts pass on what they are given."""

import io
import os
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from caption_train.cli.commands import caption_main
from caption_train.cli.exit_codes import run as run_safely
from caption_train.families import get_family
from tests.compiling.test_compile_script import blocks_of
from tests.fixtures.paths import REPOSITORY

COMMANDS = "".join(blocks_of("docs/captioning.md", "bash")).splitlines()
FAMILIES = {"inference.py": "blip", "inference_florence.py": "florence"}
IN_PROCESS = [command for command in COMMANDS if command.startswith("python ")]
LAUNCHED = [command for command in COMMANDS if command not in IN_PROCESS]


@pytest.fixture(scope="module")
def workplace(tiny_base, tmp_path_factory):
    """A folder with the images and the LoRAs that the page speaks of."""
    from caption_train.adapters.lora import wrap_with_lora

    folder = tmp_path_factory.mktemp("work place")
    for name in ("a.jpg", "b.png", "2024-01.jpg", "sub/c.png"):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(folder / "photos" / name)
    (folder / "list.txt").write_text("photos/a.jpg\n")
    (folder / "questions.csv").write_text("file_name,prompt\nphotos/a.jpg,What is blue?\n")
    for name in FAMILIES.values():
        family = get_family(name)
        model, _ = family.load(str(tiny_base(name)))
        model = wrap_with_lora(model, family.facts.lora_target_modules, rank=1, alpha=1, dropout=0)
        model.save_pretrained(folder / "loras" / name)
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for path in workplace.rglob("*.txt"):
        if path.name != "list.txt":
            path.unlink()
    return workplace


@pytest.mark.parametrize("command", IN_PROCESS)
def test_every_command_of_the_page_runs(command, here, tiny_base, monkeypatch):
    _, script, *arguments = shlex.split(command)
    family = FAMILIES[script]
    base = str(tiny_base(family))
    monkeypatch.setattr(type(get_family(family)), "model_id", base)
    replaced = {"loras/my-style": f"loras/{family}", "Salesforce/blip-image-captioning-large": base}
    arguments = [replaced.get(argument, argument) for argument in arguments]
    if "--max_token_length" not in arguments:
        arguments += ["--max_token_length", "4"]
    assert caption_main(family, [*arguments, "--num_workers", "0", "--device", "cpu"]) == 0
    if "--save_captions" in arguments:
        assert sorted(path.name for path in Path("photos").glob("*.txt")) == ["2024-01.txt", "a.txt", "b.txt"]
    if "--output" in arguments:
        assert Path(arguments[arguments.index("--output") + 1]).read_text()


def test_captions_can_be_printed_on_a_terminal_that_knows_only_ascii(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert run_safely(lambda: print("café 🐈", flush=True) or 0) == 0
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\U0001f408\n"


def test_the_page_launches_what_is_tested_elsewhere():
    programs = [next(part for part in shlex.split(command) if "=" not in part) for command in LAUNCHED]
    assert programs == ["torchrun", "bash", "bash"]


@pytest.fixture
def scripts(tmp_path):
    """A clone with nothing but the shell scripts; its accelerate and python print their arguments."""
    (tmp_path / "scripts").mkdir()
    for path in (REPOSITORY / "scripts").glob("caption_*.sh"):
        (tmp_path / "scripts" / path.name).write_bytes(path.read_bytes())
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("accelerate", "python"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path / "scripts"


def run(script, *arguments, **environment):
    names = ("INPUT", "LORA_MODEL", "BASE_MODEL", "BEAMS")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", str(script), *arguments], env=inherited | environment, capture_output=True, text=True
    )


ODD = "my 'photos' $HOME *"


@pytest.mark.parametrize("name", ["caption_blip.sh", "caption_florence.sh"])
@pytest.mark.parametrize("by_argument", [True, False])
def test_paths_with_spaces_and_quotes_arrive_whole(scripts, name, by_argument):
    if by_argument:
        done = run(scripts / name, ODD, "my lora", "--save_captions", "--prefix", "a b", BASE_MODEL="./b c")
    else:
        settings = {"INPUT": ODD, "LORA_MODEL": "my lora", "BASE_MODEL": "./b c"}
        done = run(scripts / name, "--save_captions", "--prefix", "a b", **settings)
    given = done.stdout.splitlines()
    pairs = list(pairwise(given))
    assert done.returncode == 0, done.stderr
    assert {("--images", ODD), ("--peft_model", "my lora"), ("--base_model", "./b c")} <= set(pairs)
    assert given[-3:] == ["--save_captions", "--prefix", "a b"]
    assert ("--beams", "10") in pairs or name == "caption_florence.sh"


@pytest.mark.parametrize("name", ["caption_blip.sh", "caption_florence.sh"])
def test_without_images_the_script_says_what_to_give(scripts, name):
    done = run(scripts / name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "set INPUT" in done.stderr


def test_without_a_lora_none_is_given(scripts):
    assert "--peft_model" not in run(scripts / "caption_blip.sh", "photos", "--save_captions").stdout

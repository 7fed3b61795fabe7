"""What the pages show: every command is one our parsers accept, the three steps of the README run."""

import re
import shlex
import shutil
import subprocess

import pytest

from caption_train.cli.commands import (
    caption_main,
    compile_main,
    evaluate_main,
    export_main,
    merge_main,
    review_main,
    train_main,
)
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.sample_set import CAPTIONS

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("examples/*.md")])
MAINS = {
    "compile_captions.py": compile_main,
    "evaluate_captions.py": evaluate_main,
    "export_adapter.py": export_main,
    "merge_captions.py": merge_main,
    "review_captions.py": review_main,
    "train_blip_network.py": lambda argv: train_main("blip", argv),
    "train_florence_lora.py": lambda argv: train_main("florence", argv),
    "train_moondream_lora.py": lambda argv: train_main("moondream", argv),
    "train_vlm_lora.py": lambda argv: train_main("vlm", argv),
    "inference_vlm.py": lambda argv: caption_main("vlm", argv),
    "inference.py": lambda argv: caption_main("blip", argv),
    "inference_florence.py": lambda argv: caption_main("florence", argv),
    "inference_moondream.py": lambda argv: caption_main("moondream", argv),
}
OTHER_PROGRAMS = {
    "caption-train",
    "source",
    "pip",
    "uv",
    "poetry",
    "tensorboard",
    "wandb",
    "pre-commit",
    "git",
    "cd",
    "mkdir",
    "cp",
}


def read_commands(page):
    """Return the commands in a page's ```bash blocks, as words; continued lines are one command."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def name_of(page):
    return str(page.relative_to(REPOSITORY))


def find_script(words):
    """Return (script of this repository, its arguments) in a command, or None where another program runs."""
    for place, word in enumerate(words):
        if word.endswith((".py", ".sh")) and not word.startswith("-"):
            return word, words[place + 1 :]
    return None


COMMANDS = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in read_commands(page)
]


def test_the_pages_have_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_on_a_page_is_accepted(words, parsed, tmp_path, monkeypatch, capsys):
    found = find_script(words)
    if found is None:
        assert words[0] in OTHER_PROGRAMS or words[:3] == ["python", "-m", "venv"], words
        return
    script, arguments = found
    assert (REPOSITORY / script).is_file()
    monkeypatch.chdir(tmp_path)
    # What a command's own check looks for on the disk.
    (tmp_path / "loras/my-style").mkdir(parents=True)
    (tmp_path / "loras/my-style/adapter_config.json").write_text("{}")
    if "--config" in arguments:
        (tmp_path / arguments[arguments.index("--config") + 1]).write_text("dataset_dir: a\noutput_dir: b\n")
    if script in MAINS and arguments != ["--help"]:
        assert MAINS[script](arguments) == 2
        error = capsys.readouterr().err
        assert parsed and "stopped after the flags" in error, error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs/README.md").read_text("utf-8")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_every_shell_script_is_well_formed():
    scripts = [*REPOSITORY.glob("scripts/*.sh"), REPOSITORY / ".ci/run"]
    assert len(scripts) >= 4
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        assert "set -euo pipefail" in script.read_text("utf-8")
    assert (REPOSITORY / ".ci/run").read_text("utf-8").rstrip().endswith("bash scripts/test.sh")


def test_the_readmes_three_steps_work(tiny_base, pairs_folder, tmp_path, monkeypatch):
    """As printed, with a tiny base for the hub's and what makes it short."""
    steps = [c for c in map(find_script, read_commands(REPOSITORY / "README.md")) if c and c[0] in MAINS]
    assert [script for script, _ in steps] == [
        *("compile_captions.py", "train_florence_lora.py", "inference_florence.py"),
    ]
    monkeypatch.chdir(tmp_path)
    # A copy: compiling writes metadata.jsonl into the folder.
    shutil.copytree(pairs_folder, tmp_path / "images")
    (tmp_path / "photos").mkdir()
    for image in pairs_folder.glob("*.png"):
        (tmp_path / "photos" / image.name).symlink_to(image)
    short = {
        "train_florence_lora.py": [
            "--model_id",
            str(tiny_base("florence")),
            "--epochs",
            "1",
            "--device",
            "cpu",
        ],
        "inference_florence.py": ["--device", "cpu", "--max_token_length", "4", "--num_workers", "0"],
    }
    for script, arguments in steps:
        assert MAINS[script]([*arguments, *short.get(script, [])]) == 0, script
    assert len(list((tmp_path / "photos").glob("*.txt"))) == len(CAPTIONS)

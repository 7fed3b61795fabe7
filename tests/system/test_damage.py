"""What is wrong with the files of a model, in one line that names the file."""

import os
import shutil

import pytest

from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.system.damage import explaining_damage, find_damage, refuse_odd_files


@pytest.fixture(params=["blip", "florence", "moondream", "vlm"])
def copy(request, tiny_base, tmp_path):
    """A family, and a copy of its tiny base to damage."""
    return get_family(request.param), shutil.copytree(tiny_base(request.param), tmp_path / "base")


def load(family, folder) -> str:
    with pytest.raises(CaptionTrainError) as error:
        family.load(str(folder))
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


def test_a_file_that_was_downloaded_by_half_is_named(copy):
    family, folder = copy
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors" in load(family, folder)


@pytest.mark.parametrize("content", ["", "[1, 2]", "{" * 9, '{"a": ' * 100_000, "\x80"])
def test_a_broken_config_is_named(copy, content):
    family, folder = copy
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in load(family, folder) or content == "[1, 2]"


def test_a_tokenizer_that_is_cut_is_named(copy):
    family, folder = copy
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content[:500])
    assert "tokenizer.json" in load(family, folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "loop"])
def test_what_is_no_regular_file_is_never_waited_for(name, kind, tmp_path):
    path = tmp_path / name
    make = {
        "pipe": lambda: os.mkfifo(path),
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
    }
    make[kind]()
    with pytest.raises(
        CaptionTrainError, match=rf"--model_id x: {name} (is not a regular file|cannot be read)"
    ):
        refuse_odd_files(tmp_path, "--model_id x")


def test_a_guard_lets_pass_what_is_no_damage():
    with pytest.raises(KeyboardInterrupt), explaining_damage("x"):
        raise KeyboardInterrupt
    with pytest.raises(MemoryError), explaining_damage("x"):
        raise MemoryError
    with pytest.raises(CaptionTrainError, match=r"^x: KeyError 'a'$") as error, explaining_damage("x"):
        raise KeyError("a")
    assert isinstance(error.value.__cause__, KeyError)


def test_a_sound_folder_has_no_damage(tiny_base):
    assert find_damage(tiny_base("blip")) is None

"""What `import caption_train` offers, and the command that is installed with it."""

import doctest
import json
import subprocess
import sys

import pytest
from PIL import Image

import caption_train
from caption_train.cli.commands import main
from tests.fixtures.paths import REPOSITORY


def test_the_examples_of_the_page_run(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    page = REPOSITORY / "docs" / "python.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried > 15 and failed == 0


def test_every_public_name_is_there():
    for name in caption_train.__all__:
        assert getattr(caption_train, name).__doc__ or name == "__version__"
    assert set(caption_train.__all__) <= set(dir(caption_train))
    with pytest.raises(AttributeError, match="no_such_name"):
        caption_train.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, caption_train; sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("flags", [{"no_such_flag": 1}, {"beams": 0}, {"peft_model": "no/such/folder"}])
def test_what_the_scripts_refuse_the_functions_refuse(flags):
    with pytest.raises(caption_train.UsageError):
        caption_train.caption(Image.new("RGB", (8, 8)), family="blip", **flags)


def test_an_unreadable_image_is_an_error_that_names_it(tmp_path, tiny_base):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(caption_train.CaptionTrainError, match=r"broken\.png"):
        caption_train.caption(
            tmp_path / "broken.png", family="blip", base_model=tiny_base("blip"), device="cpu"
        )


def test_no_images_give_no_captions():
    assert caption_train.caption([], family="blip") == []


def test_evaluating_returns_what_it_writes(tiny_base, pairs_folder, tmp_path, capsys):
    base = tiny_base("blip")
    (tmp_path / "images").mkdir()
    for path in pairs_folder.iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    (tmp_path / "images/broken.txt").write_text("broken")
    flags = {"family": "blip", "base_model": base, "device": "cpu", "max_token_length": 8, "resamples": 100}
    found = caption_train.evaluate(tmp_path / "images", tmp_path / "out", split="all", quiet=True, **flags)
    assert found == json.loads((tmp_path / "out/evaluation.json").read_text())
    assert found["images"] == 4 and "broken.png" in found["unreadable"][0]
    assert capsys.readouterr().out == ""
    with pytest.raises(caption_train.UsageError, match="nothing to evaluate: give --peft_model"):
        caption_train.evaluate(pairs_folder, tmp_path / "out")
    with pytest.raises(caption_train.UsageError, match="there is no such folder"):
        caption_train.evaluate(pairs_folder, tmp_path / "out", peft_model="no/such/folder")


def test_a_worse_adapter_is_an_error_after_all_is_written(overfitted, pairs_folder, tmp_path):
    adapters = [overfitted("blip")]
    flags = {"peft_model": adapters, "device": "cpu", "resamples": 100}
    caption_train.evaluate(pairs_folder, tmp_path / "out", fail_on_regression=["exact_match"], **flags)
    for row in json.loads((tmp_path / "out/evaluation.json").read_text())["captions"]:
        path = tmp_path / "images" / row["file"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((pairs_folder / row["file"]).read_bytes())
        path.with_suffix(".txt").write_text(row["models"]["base"]["text"])
    with pytest.raises(caption_train.CaptionTrainError, match=r"exact_match 0\.0000, base 1\.0000"):
        caption_train.evaluate(
            tmp_path / "images", tmp_path / "out", fail_on_regression=["exact_match"], **flags
        )
    assert (
        json.loads((tmp_path / "out/evaluation.json").read_text())["models"][0]["metrics"]["exact_match"][
            "value"
        ]
        == 1
    )


COMMANDS = {
    ("compile",): "compile_captions.py",
    ("evaluate",): "evaluate_captions.py",
    ("review",): "review_captions.py",
    ("export",): "export_adapter.py",
    ("train", "blip"): "train_blip_network.py",
    ("caption", "florence"): "inference_florence.py",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_has_the_flags_of_the_script(words, capsys):
    script = [sys.executable, COMMANDS[words], "--help"]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert shown.partition("options:")[2] == done.stdout.partition("options:")[2]
    assert shown.startswith("usage: ") and " ".join(words) in shown.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "train: name a family"),
        (["train", "clip"], "clip: no such family"),
        (["tain", "blip"], "tain: no such command"),
        (["caption", "blip"], "--images is required"),
    ],
)
def test_what_the_command_does_not_know_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "caption_train", "--version"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == f"caption-train {caption_train.__version__}\n"


def test_what_a_function_does_not_do_it_refuses(tmp_path):
    image = Image.new("RGB", (8, 8))
    for flags in ({"output": "out.jsonl"}, {"save_captions": True}, {"task": "<OD>"}, {"system_prompt": "x"}):
        with pytest.raises(caption_train.UsageError, match="there is no such flag"):
            caption_train.caption(image, family="blip", **flags)
    with pytest.raises(caption_train.UsageError, match="plan: there is no such flag"):
        caption_train.train("blip", tmp_path, tmp_path / "out", plan=True)
    with pytest.raises(caption_train.UsageError, match="dry_run"):
        caption_train.compile_dataset(tmp_path, dry_run=True)


@pytest.mark.parametrize("flags", [{"dtype": "float99"}, {"scheduler": "Foo"}, {"batch_size": []}])
def test_a_value_that_a_flag_has_not_is_named(tmp_path, flags):
    (name,) = flags
    with pytest.raises(caption_train.UsageError, match=f"{name}: .* is not a valid value"):
        caption_train.train("blip", tmp_path, tmp_path / "out", **flags)


def test_a_trigger_frames_a_caption_as_in_the_scripts(tiny_base):
    settings = {"family": "blip", "base_model": tiny_base("blip"), "device": "cpu"}
    image = Image.new("RGB", (64, 64), "red")
    (plain,) = caption_train.caption(image, **settings)
    assert caption_train.caption(image, trigger="zwx", **settings) == [f"zwx, {plain}"]


def test_pixels_without_a_meaning_are_an_error_of_the_image(tiny_base):
    image = Image.new("LAB", (8, 8))
    with pytest.raises(caption_train.CaptionTrainError, match="image 0"):
        caption_train.caption(image, family="blip", base_model=tiny_base("blip"), device="cpu")


def test_the_installed_command_names_itself_as_what_comes_next(tmp_path):
    command = [
        sys.executable,
        "-m",
        "caption_train",
        "compile",
        "examples/shapes/heldout",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    following = done.stdout.splitlines()[-4:]
    assert all(line.startswith("  caption-train train ") for line in following)

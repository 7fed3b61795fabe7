"""Captions of an evaluation are kept: nothing is made twice, and whatever changes is made again."""

import json
import os
import shutil
import signal
import sys

import pytest
from PIL import Image

from caption_train.captioning import generate
from caption_train.cli.commands import evaluate_main
from caption_train.config.evaluation import EvaluateOptions
from caption_train.evaluation import captions as captions_module
from caption_train.evaluation.candidates import find_candidates
from caption_train.families import FAMILIES, get_family
from caption_train.families.weight_files import hash_model
from caption_train.features.encoder import KeepingEncoder
from tests.fixtures.evaluation import FAST, read, run
from tests.fixtures.forked import start
from tests.fixtures.runs import write_pairs
from tests.fixtures.sample_set import CAPTIONS


@pytest.fixture
def no_model(monkeypatch):
    """Make loading a model an error."""
    monkeypatch.setattr(captions_module, "_generate", None)


GENERATE = captions_module._generate


def test_a_second_run_captions_nothing_and_writes_the_same(overfitted, pairs_folder, tmp_path, no_model):
    # `no_model` is undone for the first run.
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(captions_module, "_generate", GENERATE)
        assert run(pairs_folder, tmp_path, "--peft_model", overfitted("blip")) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run(pairs_folder, tmp_path, "--peft_model", overfitted("blip")) == 0
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(TypeError):
        run(pairs_folder, tmp_path, "--peft_model", overfitted("blip"), "--beams", "2")


def test_captions_are_kept_by_content_not_by_name_or_place(
    overfitted, pairs_folder, tmp_path, no_model, monkeypatch
):
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(captions_module, "_generate", GENERATE)
        assert run(pairs_folder, tmp_path / "out", "--peft_model", overfitted("blip")) == 0
    moved = tmp_path / "moved"
    shutil.copytree(pairs_folder, moved / "deeper")
    (moved / "deeper/0 red.png").rename(moved / "other.png")
    (moved / "deeper/0 red.txt").rename(moved / "other.txt")
    shutil.copytree(overfitted("blip"), tmp_path / "lora")
    assert run(moved, tmp_path / "out", "--peft_model", tmp_path / "lora") == 0
    assert {row["file"] for row in read(tmp_path / "out")["captions"]} >= {"other.png", "deeper/3 white.png"}


def test_other_weights_are_another_model(overfitted, train, pairs_folder, tmp_path):
    one, other = overfitted("blip"), train("blip", "--epochs", "1")
    assert run(pairs_folder, tmp_path, "--peft_model", one) == 0
    before = (tmp_path / "captions.jsonl").read_text().count("\n")
    assert run(pairs_folder, tmp_path, "--peft_model", one, "--peft_model", other) == 0
    names = [model["name"] for model in read(tmp_path)["models"]]
    assert names == ["base", one.name, other.name]
    # The base is not captioned again, nor is the first adapter.
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    assert len([line for line in lines if line]) == 12 and before >= 8


def test_a_killed_run_goes_on_from_its_captions(tiny_base, tmp_path):
    data, out, log = write_pairs(tmp_path / "images", 8), tmp_path / "out", tmp_path / "log"
    flags = ["--family", "blip", "--base_model", str(tiny_base("blip")), "--batch_size", "2", *FAST]

    def work() -> None:
        sys.exit(evaluate_main([str(data), str(out), *flags]))

    def work_and_die() -> None:
        add, calls = captions_module.Journal.add, iter(range(4))

        def die(journal, *arguments, **about):
            if next(calls, None) is None:
                with journal.path.open("ab") as file:
                    file.write(b'{"key": "hal')
                os.kill(os.getpid(), signal.SIGKILL)
            add(journal, *arguments, **about)

        captions_module.Journal.add = die
        work()

    assert start(work_and_die, log).wait() == -signal.SIGKILL, log.read_text()
    assert not (out / "evaluation.json").exists()
    kept = [line for line in (out / "captions.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(kept) == 4
    assert start(work, log).wait() == 0, log.read_text()
    assert "Captioning 4 of 8 images with base; 4 captions are there already" in log.read_text()
    fresh = tmp_path / "fresh"
    assert evaluate_main([str(data), str(fresh), *flags]) == 0
    assert read(out) == read(fresh)


def test_ctrl_c_says_how_to_go_on(overfitted, pairs_folder, tmp_path, monkeypatch, capsys):
    add = captions_module.Journal.add

    def interrupt(self, *arguments, **about):
        add(self, *arguments, **about)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(captions_module.Journal, "add", interrupt)
    # A shell starts what is in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(pairs_folder, tmp_path, "--peft_model", overfitted("blip")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("family", [name for name in sorted(FAMILIES) if get_family(name).keeps_features])
def test_models_with_one_vision_tower_encode_each_image_once(
    family, train, pairs_folder, tmp_path, monkeypatch
):
    adapter = train(family, "--epochs", "1", "--train_parts", "language")
    run(pairs_folder, tmp_path / "plain", "--peft_model", adapter)
    encoded = []
    real = KeepingEncoder._find

    def count(self, digest, *args):
        before = self.computed
        features = real(self, digest, *args)
        encoded.extend([digest] * (self.computed - before))
        return features

    monkeypatch.setattr(KeepingEncoder, "_find", count)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(pairs_folder, tmp_path / "kept", "--peft_model", adapter, "--cache_features") == 0
    assert len(encoded) == len(set(encoded)) == len(CAPTIONS)
    texts = [
        [[row["models"][name]["text"] for name in row["models"]] for row in read(tmp_path / kind)["captions"]]
        for kind in ("plain", "kept")
    ]
    assert texts[0] == texts[1]


def test_a_family_without_kept_features_says_so(tiny_base, pairs_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(get_family("vlm")), "keeps_features", False)
    flags = ["--family", "vlm", "--base_model", tiny_base("vlm"), "--cache_features"]
    assert run(pairs_folder, tmp_path / "out", *flags) == 2
    assert "--cache_features: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluated(tiny_base, overfitted, pairs_folder, tmp_path_factory):
    """A folder of images, base and LoRA, and in `out` an evaluation of them."""
    folder = tmp_path_factory.mktemp("evaluated")
    sources = {"images": pairs_folder, "base": tiny_base("blip"), "lora": overfitted("blip")}
    for name, source in sources.items():
        shutil.copytree(source, folder / name)
    assert evaluate_again(folder) == 0
    return folder


def evaluate_again(folder, *flags):
    model = ["--peft_model", folder / "lora", "--base_model", folder / "base"]
    return run(folder / "images", folder / "out", *model, *flags)


@pytest.mark.parametrize("changed", ["image", "adapter", "base", "prompt", "beams", "dtype", "quantize"])
def test_whatever_changes_is_captioned_again(changed, evaluated, tmp_path, capsys):
    folder, flags, expected = shutil.copytree(evaluated, tmp_path / "copy"), [], 4
    if changed == "image":
        Image.new("RGB", (48, 32), "pink").save(folder / "images/0 red.png")
        expected = 1
    elif changed in ("adapter", "base"):
        name = {"adapter": "lora"}.get(changed, changed)
        change_one_weight(next((folder / name).glob("*model.safetensors")))
    else:
        value = {"prompt": "a", "beams": 2, "dtype": "bfloat16", "quantize": "8bit"}[changed]
        flags = [f"--{changed}", value]
    capsys.readouterr()
    assert evaluate_again(folder, *flags) == 0
    lines = capsys.readouterr().err
    assert f"Captioning {expected} of 4 images with lora" in lines
    assert ("with base" in lines) == (changed != "adapter")
    capsys.readouterr()
    assert evaluate_again(folder, *flags) == 0
    assert "Captioning" not in capsys.readouterr().err


def change_one_weight(path):
    """Change one number in the middle of a file, as merging a LoRA into middle layers does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_base_and_adapters_run_in_the_same_precision(overfitted, pairs_folder, tmp_path, monkeypatch):
    adapter = tmp_path / "lora"
    shutil.copytree(overfitted("blip"), adapter)
    training = json.loads((adapter / "training.json").read_text())
    training["options"]["mixed_precision"] = "no"
    (adapter / "training.json").write_text(json.dumps(training))
    monkeypatch.setattr("caption_train.system.devices.has_bfloat16", lambda device: True)
    used = []
    load = generate.load_captioner

    def load_captioner(*arguments):
        model, processor = load(*arguments)
        used.append(str(model.dtype))
        return model, processor

    monkeypatch.setattr(generate, "load_captioner", load_captioner)
    assert run(pairs_folder, tmp_path / "out", "--peft_model", adapter, "--dtype", "auto") == 0
    assert used == ["torch.float32", "torch.float32"]


def test_somebody_elses_captions_are_not_added_to(overfitted, pairs_folder, tmp_path, capsys):
    mine = tmp_path / "captions.jsonl"
    mine.write_text('{"file_name": "a.png", "text": "red"}\n')
    assert run(pairs_folder, tmp_path, "--peft_model", overfitted("blip")) == 2
    assert "its captions.jsonl is not one that evaluating wrote" in capsys.readouterr().err
    assert mine.read_text() == '{"file_name": "a.png", "text": "red"}\n'


def test_a_base_that_differs_in_the_middle_of_its_weights_is_another(tmp_path):
    """As a merged LoRA does: it changes neither the first tensors nor the last."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    before = hash_model(tmp_path)
    change_one_weight(weights)
    assert hash_model(tmp_path) != before
    (tmp_path / "notes.md").write_text("not of the model")
    after = hash_model(tmp_path)
    change_one_weight(weights)
    assert before == hash_model(tmp_path) != after


def test_a_base_on_the_hub_is_known_by_its_commit_from_the_first_run_on(tmp_path, monkeypatch):
    """Else what a first run had captioned before it was stopped would be made again."""
    cache = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *_, **__: cache.append("models/snapshots/c0ffee/config.json"),
    )
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: (cache or [None])[-1])
    options = EvaluateOptions(tmp_path, tmp_path, family="blip", base_model="me/blip")
    first = find_candidates(options, get_family("blip"))
    assert first[0].identity == "c0ffee"
    assert find_candidates(options, get_family("blip")) == first

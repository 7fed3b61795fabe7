"""evaluate_captions.py from the flags to the files: every family, a stop, a cache, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from caption_train.captioning import generate
from caption_train.cli.commands import evaluate_main, main
from caption_train.config.evaluation import EvaluateOptions
from caption_train.errors import UsageError
from caption_train.evaluation import captions as captions_module
from caption_train.evaluation.candidates import find_candidates
from caption_train.evaluation.evaluate import evaluate
from caption_train.families import FAMILIES, get_family
from caption_train.families.weight_files import hash_model
from caption_train.features.encoder import KeepingEncoder
from caption_train.reporting.page import read_gallery
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.runs import write_pairs
from tests.fixtures.sample_set import CAPTIONS

FAST = ["--device", "cpu", "--num_workers", "0", "--max_token_length", "32", "--resamples", "100"]


def run(dataset_dir, output_dir, *flags):
    paths = ["--dataset_dir", dataset_dir, "--output_dir", output_dir]
    return evaluate_main([*map(str, paths), *FAST, *map(str, flags)])


def read(output_dir):
    return json.loads((output_dir / "evaluation.json").read_text())


@pytest.fixture
def no_model(monkeypatch):
    """Make loading a model an error."""
    monkeypatch.setattr(captions_module, "_generate", None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_adapter_that_knows_the_captions_is_better_than_its_base(
    family, overfitted, pairs_folder, tmp_path
):
    adapter = overfitted(family)
    assert run(pairs_folder, tmp_path / "out", "--peft_model", adapter) == 0
    base, tuned = read(tmp_path / "out")["models"]
    assert base["name"] == "base" and tuned["peft_model"] == str(adapter)
    assert tuned["metrics"]["exact_match"]["value"] == 1.0
    assert tuned["metrics"]["tag_f1"]["value"] == 1.0
    assert base["metrics"]["exact_match"]["value"] < 1.0
    assert tuned["metrics"]["exact_match"]["over_base"] > 0
    rows = read(tmp_path / "out")["captions"]
    assert [row["references"] for row in rows] == [[caption] for caption in CAPTIONS.values()]
    assert [row["models"][tuned["name"]]["text"] for row in rows] == list(CAPTIONS.values())
    page = (tmp_path / "out/report.html").read_text()
    assert "CIDEr" in page and "data:image/webp" in page
    assert [item["answers"][1][0] for item in read_gallery(tmp_path / "out/report.html")["items"]] == list(
        CAPTIONS.values()
    )
    markdown = (tmp_path / "out/evaluation.md").read_text()
    assert f"| exact match | {100 * base['metrics']['exact_match']['value']:.1f} %" in markdown


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


GENERATE = captions_module._generate


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
    data, out = write_pairs(tmp_path / "images", 8), tmp_path / "out"
    flags = ["--family", "blip", "--base_model", str(tiny_base("blip")), "--batch_size", "2", *FAST]
    script = (
        "import os, sys, signal\n"
        "from caption_train.evaluation import captions\n"
        "from caption_train.cli.commands import evaluate_main\n"
        "add, calls = captions.Journal.add, iter(range(4))\n"
        "def die(self, *a, **k):\n"
        "    if next(calls, None) is None:\n"
        '        os.write(self._file.fileno(), b\'{"key": "hal\')\n'
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, *a, **k)\n"
        "captions.Journal.add = die\n"
        "evaluate_main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(data), str(out), *flags], cwd=REPOSITORY, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "evaluation.json").exists()
    kept = [line for line in (out / "captions.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(kept) == 4
    done = subprocess.run(
        [sys.executable, "evaluate_captions.py", str(data), str(out), *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Captioning 4 of 8 images with base; 4 captions are there already" in done.stderr
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


def test_a_worse_adapter_fails_in_one_line_after_all_is_written(overfitted, pairs_folder, tmp_path, capsys):
    adapter, out, data = overfitted("blip"), tmp_path / "out", tmp_path / "images"
    flags = ["--peft_model", adapter, "--fail_on_regression"]
    assert run(pairs_folder, out, *flags, "exact_match") == 0
    # Where the references are what the base says, nothing is as good as the base.
    shutil.copytree(pairs_folder, data)
    for row in read(out)["captions"]:
        (data / row["file"]).with_suffix(".txt").write_text(row["models"]["base"]["text"])
    (out / "report.html").unlink()
    capsys.readouterr()
    assert run(data, out, *flags, "exact_match=0.05", "--quiet") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--fail_on_regression: {adapter.name} exact_match 0.0000, base 1.0000" in error
    assert (out / "report.html").exists()
    assert run(data, out, *flags, "exact_match=1") == 0


def test_images_without_captions_are_shown_side_by_side(overfitted, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    Image.new("RGB", (48, 32), "red").save(photos / "deep/a.png")
    Image.new("RGB", (48, 32), "blue").save(photos / "b.png")
    out = tmp_path / "out"
    adapter = overfitted("blip")
    assert run(photos, out, "--peft_model", adapter) == 0
    found = read(out)
    assert [row["file"] for row in found["captions"]] == ["b.png", "deep/a.png"]
    assert found["captions"][1]["models"][adapter.name]["text"] == "red"
    assert "cider" not in found["models"][0]["metrics"] and "words" in found["models"][0]["metrics"]
    flags = ["--peft_model", adapter, "--fail_on_regression", "cider"]
    assert run(photos, out, *flags) == 2
    assert "--fail_on_regression cider: the dataset has no captions" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_left_out(overfitted, pairs_folder, tmp_path, capsys):
    data = tmp_path / "images"
    shutil.copytree(pairs_folder, data)
    (data / "4 bad.png").write_bytes(b"no image")
    (data / "4 bad.txt").write_text("bad")
    assert run(data, tmp_path / "out", "--peft_model", overfitted("blip")) == 1
    found = read(tmp_path / "out")
    assert found["images"] == 4 and "4 bad.png" in found["unreadable"][0]
    assert "1 image could not be read" in capsys.readouterr().err


def test_copies_of_an_image_are_one_image_with_all_their_captions(overfitted, pairs_folder, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(pairs_folder, data)
    shutil.copy(data / "0 red.png", data / "9.png")
    (data / "9.txt").write_text("a red picture")
    assert run(data, tmp_path / "out", "--peft_model", overfitted("blip")) == 0
    first = read(tmp_path / "out")["captions"][0]
    assert (first["file"], first["references"]) == ("0 red.png", ["red", "a red picture"])


def test_the_images_that_the_run_held_out_are_evaluated(tiny_base, tmp_path, monkeypatch):
    from caption_train.cli.commands import train_main

    data, lora = write_pairs(tmp_path / "images", 8), tmp_path / "lora"
    flags = [
        "--model_id",
        tiny_base("blip"),
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--validation_split",
        "0.25",
    ]
    assert train_main("blip", [*map(str, [data, lora, *flags]), "--metrics", "cider"]) == 0
    shown = {item["name"] for item in read_gallery(lora / "report.html")["items"]}
    assert run(data, tmp_path / "out", "--peft_model", lora) == 0
    found = read(tmp_path / "out")
    assert {row["file"] for row in found["captions"]} == shown and found["images"] == 2
    assert "held out" in found["split"]
    # Of another dataset, all are.
    (data / "00.txt").write_text("something else")
    (data / "01.txt").write_text("something else")
    for name in shown:
        (data / name).with_suffix(".txt").write_text("changed")
    assert run(data, tmp_path / "out", "--peft_model", lora) == 0
    assert read(tmp_path / "out")["images"] == 8
    assert run(data, tmp_path / "out", "--peft_model", lora, "--limit", "3") == 0
    assert read(tmp_path / "out")["images"] == 3


def test_rows_of_the_split_validation_come_first(overfitted, pairs_folder, tmp_path, capsys):
    data = tmp_path / "images"
    shutil.copytree(pairs_folder, data)
    rows = [
        {"file_name": f"{number} {colour}.png", "text": caption, "split": split}
        for (number, (colour, caption)), split in zip(
            enumerate(CAPTIONS.items()), ("train", "validation", "train", "validation"), strict=True
        )
    ]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = overfitted("blip")
    for flags, count in ((), 2), (("--split", "train"), 2), (("--split", "all"), 4):
        assert run(data, tmp_path / "out", "--peft_model", adapter, *flags) == 0
        assert read(tmp_path / "out")["images"] == count
    assert run(data, tmp_path / "out", "--peft_model", adapter, "--split", "test") == 2
    assert "--split test: none of 4 pairs is in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to evaluate: give --peft_model"),
        (["--peft_model", "nowhere"], "--peft_model nowhere: there is no such folder"),
        (["--family", "blip", "--base_model", "x", "--fail_on_regression", "cider"], "give --peft_model"),
        (
            ["--peft_model", "a", "--fail_on_regression", "speed"],
            "--fail_on_regression speed: the metrics are",
        ),
        (["--peft_model", "a", "--fail_on_regression", "cider=-1"], "the tolerance is a number, 0 or more"),
        (["--peft_model", "a", "--fail_on_regression", "cider=nan"], "the tolerance is a number, 0 or more"),
        (["--peft_model", "a", "--prompt", "x", "--task", "y"], "--prompt, --task and --preset"),
        (["--peft_model", "a", "--limit", "0"], "--limit must be 1 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    flags, message, pairs_folder, tmp_path, capsys
):
    assert run(pairs_folder, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_families_are_refused(overfitted, pairs_folder, tmp_path, capsys):
    flags = ["--peft_model", overfitted("blip"), "--peft_model", overfitted("florence")]
    assert run(pairs_folder, tmp_path, *flags) == 2
    assert "one family at a time" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(overfitted, pairs_folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(overfitted("blip"), other)
    training = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps(training | {"base_model": "me/other"}))
    flags = ["--peft_model", overfitted("blip"), "--peft_model", other]
    assert run(pairs_folder, tmp_path / "out", *flags) == 2
    assert "evaluate them one by one, or give --base_model" in capsys.readouterr().err


def test_hostile_captions_and_names_stay_text(overfitted, tmp_path):
    data = tmp_path / "images"
    data.mkdir()
    name = "<img src=x onerror=alert(1)>.png"
    Image.new("RGB", (48, 32), "red").save(data / name)
    (data / name).with_suffix(".txt").write_text("</script><script>alert(1)</script> | <!-- `x` \\ [a](b)")
    assert run(data, tmp_path / "out", "--peft_model", overfitted("blip"), "--no_pictures") == 0
    page = (tmp_path / "out/report.html").read_text()
    assert (
        page.count("<script") == 2 and "<img" not in page and "<!--" not in page and "data:image" not in page
    )
    table = (tmp_path / "out/evaluation.md").read_text().partition("## Captions")[2]
    assert "<" not in table and table.splitlines()[4].count("|") == 5 and "[a](b)" not in table


def test_an_output_folder_in_use_is_refused(overfitted, pairs_folder, tmp_path, capsys):
    from caption_train.system.lock import OutputLock

    lock = OutputLock(tmp_path)
    lock.acquire()
    try:
        assert run(pairs_folder, tmp_path, "--peft_model", overfitted("blip")) == 1
    finally:
        lock.release()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("changed", ["image", "adapter", "base", "prompt", "beams", "dtype", "quantize"])
def test_whatever_changes_is_captioned_again(changed, tiny_base, overfitted, pairs_folder, tmp_path, capsys):
    data, base, adapter = tmp_path / "images", tmp_path / "base", tmp_path / "lora"
    for source, copy in (pairs_folder, data), (tiny_base("blip"), base), (overfitted("blip"), adapter):
        shutil.copytree(source, copy)
    flags = ["--peft_model", adapter, "--base_model", base]
    assert run(data, tmp_path / "out", *flags) == 0
    expected = 4
    if changed == "image":
        Image.new("RGB", (48, 32), "pink").save(data / "0 red.png")
        expected = 1
    elif changed in ("adapter", "base"):
        change_one_weight(next((adapter if changed == "adapter" else base).glob("*model.safetensors")))
    else:
        flags += [
            f"--{changed}",
            {"prompt": "a", "beams": 2, "dtype": "bfloat16", "quantize": "8bit"}[changed],
        ]
    capsys.readouterr()
    assert run(data, tmp_path / "out", *flags) == 0
    lines = capsys.readouterr().err
    assert f"Captioning {expected} of 4 images with lora" in lines
    assert ("with base" in lines) == (changed != "adapter")
    capsys.readouterr()
    assert run(data, tmp_path / "out", *flags) == 0
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


def test_several_processes_are_refused(pairs_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = EvaluateOptions(pairs_folder, tmp_path / "out", family="blip", base_model="x")
    with pytest.raises(UsageError, match="evaluate runs as one process: start it without torchrun"):
        evaluate(options)


def test_the_command_caption_train_evaluates_too(parsed):
    assert main(["evaluate", "images", "out", "--peft_model", "a", "--peft_model", "b"]) == 2
    assert [str(path) for path in parsed[-1].peft_model] == ["a", "b"]
    assert isinstance(parsed[-1], EvaluateOptions)


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

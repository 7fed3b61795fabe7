"""evaluate_captions.py from the flags to the files: every family, what is shown, refusals."""

import json
import shutil

import pytest
from PIL import Image

from caption_train.cli.commands import main
from caption_train.config.evaluation import EvaluateOptions
from caption_train.errors import UsageError
from caption_train.evaluation.evaluate import evaluate
from caption_train.families import FAMILIES
from caption_train.reporting.page import read_gallery
from tests.fixtures.evaluation import read, run
from tests.fixtures.runs import write_pairs
from tests.fixtures.sample_set import CAPTIONS


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


def test_several_processes_are_refused(pairs_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = EvaluateOptions(pairs_folder, tmp_path / "out", family="blip", base_model="x")
    with pytest.raises(UsageError, match="evaluate runs as one process: start it without torchrun"):
        evaluate(options)


def test_the_command_caption_train_evaluates_too(parsed):
    assert main(["evaluate", "images", "out", "--peft_model", "a", "--peft_model", "b"]) == 2
    assert [str(path) for path in parsed[-1].peft_model] == ["a", "b"]
    assert isinstance(parsed[-1], EvaluateOptions)

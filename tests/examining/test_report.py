"""--report beside all that compiling does: nothing else changes, and errors come before the work."""

import csv
import json
import os
import re
import sys

import pytest

import caption_train
from caption_train.cli.commands import compile_main, main
from caption_train.data.scan import image_id
from caption_train.errors import UsageError
from tests.fixtures.sample_set import write_image

ID = re.compile(r"#item=([0-9a-f]{24})")


def give_files(add):
    add("a.png", "a cat")
    add("sub/b.png", "a dog")
    return []


def give_table(add):
    add("a.png")
    add("sub/b.png")
    with (add.folder.parent / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), ("a.png", "a cat"), ("sub/b.png", "a dog")])
    return ["--captions", str(add.folder.parent / "table.csv")]


def give_kohya(add):
    add("10_pets/a.png")
    add("10_pets/b.png", "a dog")
    (add.folder / "meta_cap.json").write_text(json.dumps({"a": {"caption": "a cat"}}))
    return ["--kohya_repeats"]


@pytest.mark.parametrize("give", [give_files, give_table, give_kohya])
@pytest.mark.parametrize("flags", [[], ["--validation_split", "0.5"], ["--check_images"]])
def test_the_dataset_is_the_same_with_and_without_it(add, tmp_path, give, flags, capsys):
    arguments = [str(add.folder), *give(add), *flags]
    written = add.folder / "metadata.jsonl"
    assert compile_main(arguments) == 0
    without, said = written.read_bytes(), capsys.readouterr().out
    written.unlink()
    report = tmp_path / "dataset.html"
    assert compile_main([*arguments, "--report", str(report)]) == 0
    assert written.read_bytes() == without
    assert capsys.readouterr().out.replace(f"Wrote {report}: open it in a browser\n", "") == said
    text = report.read_text("utf-8")
    assert "<dt>Images</dt><dd>2</dd>" in text and "<dt>Captions</dt><dd>2</dd>" in text
    assert {path.name for path in tmp_path.iterdir()} <= {"images", "table.csv", "dataset.html"}


def test_captions_that_are_in_metadata_jsonl_alone_are_examined(add, tmp_path, capsys):
    add("a.png")
    add("sub/b.png")
    rows = [{"file_name": "a.png", "text": "a cat</s>"}, {"file_name": "gone.png", "text": "x"}]
    (add.folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = tmp_path / "dataset.html"
    # As without the flag: there is nothing to compile.
    assert compile_main([str(add.folder), "--report", str(report)]) == 1
    assert "training reads as it is" in capsys.readouterr().err
    text = report.read_text("utf-8")
    assert "rows of metadata.jsonl" in text and "rows that cannot be used" in text and "gone.png" in text
    assert "<dt>Images without a caption</dt><dd>1</dd>" in text
    assert '<p class="measured">&lt;/s&gt;</p>' in text


def test_what_was_left_out_is_counted_by_its_reason(add, examine):
    add("a.png", "a cat")
    add("b.png", "")
    (add.folder / "c.txt").write_text("nobody's")
    (add.folder / "d.cr2").write_bytes(b"x")
    counts = examine().counts()
    assert counts == {
        "images": 2,
        "pairs of image and caption": 1,
        "images of other formats": 1,
        "empty captions": 1,
        "captions without an image": 1,
    }


@pytest.mark.parametrize("names", [(), ("a.png",)])
def test_a_folder_without_pairs_has_a_page_too(add, tmp_path, names, capsys):
    for name in names:
        add(name)
    assert compile_main([str(add.folder), "--report", str(tmp_path / "x.html")]) == 1
    assert "no pair of image and caption" in capsys.readouterr().err
    assert f"<dt>Images</dt><dd>{len(names)}</dd>" in (tmp_path / "x.html").read_text("utf-8")


def test_a_dry_run_writes_the_page_and_no_dataset(add, tmp_path):
    add("a.png", "a cat")
    assert compile_main([str(add.folder), "--dry_run", "--report", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").exists() and not (add.folder / "metadata.jsonl").exists()


def test_the_page_is_written_where_compiling_ends_badly(add, tmp_path, capsys):
    add("a.png", "a cat")
    add("b.png", "a dog").write_bytes(b"")
    arguments = [str(add.folder), "--check_images", "--report", str(tmp_path / "x.html")]
    assert compile_main(arguments) == 1
    assert "1 files could not be used" in capsys.readouterr().err
    assert "images that cannot be decoded" in (tmp_path / "x.html").read_text("utf-8")


def test_links_name_images_as_the_review_page_of_the_command_does(add, examine, tmp_path):
    from caption_train.reviewing.items import Library

    for name in ("a.png", "sub/b.png", "sub/c.png"):
        add(name, "the same", size=(60, 60))
    add("d.png", size=(60, 60))
    inside = examine()
    assert set(ID.findall(inside.text)) == set(Library(add.folder))
    assert f"python review_captions.py {add.folder}" in inside.text
    (add.folder / "metadata.jsonl").unlink()
    above = examine(tmp_path)
    assert set(ID.findall(above.text)) == set(Library(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    # Only what has a caption comes along into another folder.
    elsewhere = examine(tmp_path / "out")
    assert set(ID.findall(elsewhere.text)) == set(Library(tmp_path / "out"))
    assert len(set(Library(tmp_path / "out"))) == 3 and "d.png" in elsewhere.names("captionless")
    planned = examine(tmp_path / "other", dry_run=True)
    assert set(ID.findall(planned.text)) == set(Library(add.folder))


def test_the_command_says_where_captions_are(add, examine):
    add("a.png")
    (add.folder / "a.caption").write_text("a cat")
    assert "--caption_extension .caption</code>" in examine(dry_run=True).text
    assert "--caption_extension" not in examine().text


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--report", "{tmp}/no/x.html"], 2, "there is no folder {tmp}/no"),
        (["--report", "{tmp}/folder.html"], 2, "is a folder"),
        (["--report", "{tmp}/pipe.html"], 2, "is no regular file"),
        (["--report", "{tmp}/images/a.png"], 2, "must end in .html"),
        (["--report", "{tmp}/" + "x" * 300 + ".html"], 2, "File name too long"),
        (["--report", "{tmp}/images/a.png/x.html"], 2, "--report"),
        (["--family", "blip"], 2, "--family only has a meaning with --report"),
        (
            ["--report", "{tmp}/x.html", "--max_length", "9"],
            2,
            "--max_length only has a meaning with --family",
        ),
        (["--report", "{tmp}/x.html", "--family", "vlm"], 2, "name a model with --model_id, such as Qwen"),
        (["--report", "{tmp}/x.html", "--family", "none"], 2, "--family"),
        (["--report", "{tmp}/x.html", "--family", "blip"], 1, "the hub cannot be reached"),
        (
            ["--report", "{tmp}/x.html", "--family", "blip", "--model_id", "./no"],
            2,
            "there is no such folder",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_the_work(
    add, tmp_path, capsys, monkeypatch, flags, status, message
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    add("a.png", "a cat")
    (tmp_path / "folder.html").mkdir()
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.html")
    monkeypatch.setattr("caption_train.examining.examine.measure_images", lambda _: pytest.fail("began"))
    assert compile_main([str(add.folder), *(flag.format(tmp=tmp_path) for flag in flags)]) == status
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error and "Traceback" not in error
    assert not (add.folder / "metadata.jsonl").exists()


def test_without_the_library_the_extra_is_named(add, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("caption_train.examining.examine.find_spec", lambda name: None)
    assert compile_main([str(add.folder), "--report", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert "pip install '.[report]'" in error and "imagehash" in error


def test_a_page_that_cannot_be_written_leaves_the_old_one(add, tmp_path, capsys, monkeypatch):
    add("a.png", "a cat")
    (tmp_path / "x.html").write_text("old")

    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("caption_train.reporting.dataset.write_atomically", fail)
    assert compile_main([str(add.folder), "--report", str(tmp_path / "x.html")]) == 1
    assert f"--report {tmp_path / 'x.html'}: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "x.html").read_text() == "old"


def test_a_config_file_the_command_and_python_take_it(add, tmp_path, tiny_base):
    add("a.png", "a cat")
    base = str(tiny_base("blip"))
    settings = {"report": str(tmp_path / "1.html"), "family": "blip", "model_id": base, "max_length": 64}
    (tmp_path / "settings.yaml").write_text(json.dumps(settings | {"dataset_dir": str(add.folder)}))
    assert compile_main(["--config", str(tmp_path / "settings.yaml")]) == 0
    flags = [f"--{name}={value}" for name, value in (settings | {"report": tmp_path / "2.html"}).items()]
    assert main(["compile", str(add.folder), *flags]) == 0
    caption_train.compile_dataset(add.folder, **settings | {"report": tmp_path / "3.html"})
    pages = [(tmp_path / f"{number}.html").read_text("utf-8") for number in (1, 2, 3)]
    assert pages[0] == pages[1] == pages[2] and "cut" in pages[0]
    with pytest.raises(UsageError, match="the families are"):
        caption_train.compile_dataset(add.folder, report=tmp_path / "x.html", family="none")


def test_an_id_depends_on_the_name_alone():
    assert image_id("a/b.png") == image_id("a/b.png") != image_id("a/c.png")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such name")
def test_a_name_that_is_no_text_is_shown_escaped(add, examine):
    add("a.png", "a cat")
    write_image(add.folder / os.fsdecode(b"caf\xe9.png"), "red", (30, 30))
    assert "caf\\udce9.png" in examine().names("captionless")

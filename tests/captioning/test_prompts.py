"""What every image is asked, several captions of an image, and trying a few images."""

import csv
import json
import re

import pytest
from PIL import Image

from caption_train.captioning.job import caption_folder
from caption_train.captioning.prompts import Template
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from tests.fixtures.fake_family import FakeFamily


@pytest.fixture
def folder(tmp_path):
    """Five images from black to white, 0.png … 4.png, in a folder `shots`."""
    (tmp_path / "shots").mkdir()
    for level in range(5):
        Image.new("RGB", (8, 6), (level * 63,) * 3).save(tmp_path / f"shots/{level}.png")
    return tmp_path / "shots"


def run(images, family=None, **options):
    settings = {"images": [str(images)], "num_workers": 0, "batch_size": 2} | options
    checked = CaptionOptions(**settings)
    assert checked.check() == []
    return caption_folder(checked, family or FakeFamily())


def rows_of(path):
    return {row["file_name"]: row for row in map(json.loads, path.read_text().splitlines())}


def files_of(folder):
    return {path.name: path.read_text().strip() for path in sorted(folder.glob("*.txt"))}


def test_a_template_is_filled_for_every_image(folder):
    (folder / "1.txt").write_text("a hat\non a mat")
    tags = [
        {"file_name": "1.png", "tags": ["hat", "mat"]},
        {"file_name": "2.png", "tags": "x", "text": "row"},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, tags)))
    template = "{name}|{folder}|{caption}|{tags}|{{x}}"
    output = folder.parent / "out.jsonl"
    assert run(folder, output=output, prompt_template=template, metadata=folder / "data.jsonl") == 0
    texts = [row["text"].rpartition(" ")[0] for row in rows_of(output).values()]
    assert texts == [
        *("0|shots|||{x}", "1|shots|a hat on a mat|hat, mat|{x}", "2|shots|row|x|{x}"),
        *("3|shots|||{x}", "4|shots|||{x}"),
    ]


def test_a_caption_is_rewritten_from_itself(folder):
    run(folder, save_captions=True)
    run(folder, save_captions=True, existing="overwrite", prompt_template="again: {caption}")
    assert files_of(folder)["0.txt"] == "again: say dark dark"


def test_a_prompt_with_braces_is_no_template(folder):
    run(folder / "0.png", save_captions=True, prompt='{"caption": {name}} {')
    assert files_of(folder) == {"0.txt": '{"caption": {name}} { dark'}


@pytest.mark.parametrize(
    "text", ["{size}", "{caption!r}", "{name:>9}", "{", "a } b", "{}", "{0}", "{name.x}"]
)
def test_a_template_that_cannot_be_filled_is_one_line(text):
    with pytest.raises(
        UsageError, match=r"--prompt_template: .*\{caption\} \{tags\} \{name\} \{folder\}"
    ) as caught:
        Template("--prompt_template", text)
    assert "\n" not in str(caught.value)


def test_braces_in_a_caption_are_no_fields(folder):
    (folder / "0.txt").write_text("{name} {x")
    run(folder / "0.png", output=folder / "o.jsonl", prompt_template="{caption}")
    assert rows_of(folder / "o.jsonl")["0.png"]["text"] == "{name} {x dark"


def test_a_row_says_what_its_image_is_asked(folder, capsys):
    output = folder / "out.jsonl"
    output.write_text('{"file_name": "1.png", "prompt": "what hat"}\n{"file_name": "2.png", "prompt": ""}\n')
    run(folder, output=output, num_workers=1)
    rows = rows_of(output)
    assert [rows[f"{n}.png"]["text"].rpartition(" ")[0] for n in range(5)] == [
        "say",
        "what hat",
        "say",
        "say",
        "say",
    ]
    assert rows["1.png"]["prompt"] == "what hat"
    assert "its column prompt says what 1 images are asked" in capsys.readouterr().err


def test_rows_of_a_table_say_it_too(folder):
    table = folder.parent / "ask.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "prompt"], ["shots/0.png", "who"], [folder / "1.png", "where"]]
        )
    run(folder, save_captions=True, metadata=table)
    assert [text.rpartition(" ")[0] for text in files_of(folder).values()] == [
        "who",
        "where",
        "say",
        "say",
        "say",
    ]


def test_a_template_may_have_the_prompt_of_the_row_in_it(folder):
    (folder / "ask.jsonl").write_text('{"file_name": "1.png", "prompt": "what hat"}\n{"file_name": "2.png"}')
    settings = {"metadata": folder / "ask.jsonl", "save_captions": True}
    run(folder, prompt_template="Answer: {prompt}", **settings)
    texts = [text.rpartition(" ")[0] for text in files_of(folder).values()]
    assert texts[:3] == ["Answer: say", "Answer: what hat", "Answer: say"]
    run(folder, prompts=["long={prompt}, at length", "short=tell"], **settings)
    files = files_of(folder)
    assert files["1.long.txt"].startswith("what hat, at length") and files["1.short.txt"].startswith("tell")


def test_a_prompt_that_the_family_refuses_is_its_images_alone(folder, capsys):
    class Picky(FakeFamily):
        def check_prompt(self, prompt):
            if "early" in prompt:
                raise UsageError("--prompt: early")

    rows = [{"file_name": "1.png", "prompt": "refused"}, {"file_name": "2.png", "prompt": "early"}]
    (folder / "ask.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"file_name": "3.png", "prompt": 3}]))
    )
    assert run(folder, Picky(), save_captions=True, metadata=folder / "ask.jsonl") == 1
    assert sorted(files_of(folder)) == ["0.txt", "4.txt"]
    err = capsys.readouterr().err
    for line in (
        "1.png: --prompt: refused",
        "2.png: --prompt: early",
        "3.png: prompt in its row is not a string",
    ):
        assert line in err


def test_a_metadata_file_that_cannot_be_read_is_one_line(folder):
    (folder / "bad.jsonl").write_text("{")
    for name, reason in (("bad.jsonl", "no JSON"), ("gone.jsonl", "No such file")):
        with pytest.raises(UsageError, match=rf"--metadata .*{name}: cannot be read: .*{reason}"):
            run(folder, metadata=folder / name)


def test_the_first_images_that_are_left_are_tried(folder, capsys):
    (folder / "0.txt").write_text("by hand")
    run(folder, save_captions=True, limit=2)
    assert sorted(files_of(folder)) == ["0.txt", "1.txt", "2.txt"]
    assert "2 images captioned" in (err := capsys.readouterr().err) and "2 left by --limit" in err
    run(folder, save_captions=True, limit=2)
    assert len(files_of(folder)) == 5
    assert "left by" not in capsys.readouterr().err


def test_tries_of_an_addition_go_on_and_add_once(folder):
    for level in range(5):
        (folder / f"{level}.txt").write_text("old")
    for _ in range(3):
        run(folder, save_captions=True, limit=2, existing="append")
    assert len(files := files_of(folder)) == 5
    assert all(re.fullmatch(r"old, say \w+", text) for text in files.values()), files
    assert not list(folder.glob(".*"))


NAMED = ["short=tell", "long=tell all of {name}", "text=say"]


def test_named_prompts_go_to_columns_and_files_of_their_names(folder):
    family = FakeFamily()
    output = folder / "out.jsonl"
    assert run(folder, family, save_captions=True, output=output, prompts=NAMED) == 0
    assert len(family.loaded) == 1
    rows = rows_of(output)
    assert list(rows) == [f"{level}.png" for level in range(5)]
    assert rows["0.png"] == {
        "file_name": "0.png", "short": "tell dark", "long": "tell all of 0 dark", "text": "say dark"
    }  # fmt: skip
    files = files_of(folder)
    assert (files["0.short.txt"], files["0.long.txt"], files["0.txt"]) == (
        *("tell dark", "tell all of 0 dark", "say dark"),
    )
    assert len(files) == 15 and not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_what_is_missing_of_named_captions_is_made(folder, name, capsys):
    output = folder / name
    run(folder / "0.png", output=output, prompts=NAMED[:2])
    family = FakeFamily()
    run(folder, family, output=output, prompts=NAMED)
    assert sum(family.model.batches) == 3 * 5 - 2
    assert "13 captions made" in capsys.readouterr().err
    family = FakeFamily()
    run(folder, family, output=output, prompts=NAMED)
    assert family.loaded == []


def test_named_captions_survive_an_interrupt(folder):
    output = folder / "out.jsonl"
    assert (
        run(folder, FakeFamily(KeyboardInterrupt()), save_captions=True, output=output, prompts=NAMED) == 130
    )
    family = FakeFamily()
    assert run(folder, family, save_captions=True, output=output, prompts=NAMED) == 0
    assert sum(family.model.batches) == 3 * 5 - 4
    assert all(set(row) == {"file_name", "short", "long", "text"} for row in rows_of(output).values())
    assert len(files_of(folder)) == 15


def test_named_captions_are_added_to_under_their_names(folder):
    output = folder / "out.jsonl"
    output.write_text('{"file_name": "0.png", "short": "old", "text": "kept"}\n')
    for _ in range(2):
        run(folder / "0.png", output=output, prompts=NAMED[:1], existing="append")
    assert rows_of(output)["0.png"] == {
        "file_name": "0.png", "text": "kept", "short": "old, tell dark, tell dark"
    }  # fmt: skip


def test_named_captions_are_printed_with_their_names(folder, capsys):
    run(folder / "0.png", prompts=NAMED)
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["[short] tell dark", "[long] tell all of 0 dark", "[text] say dark"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["x"]}, "write NAME=PROMPT"),
        ({"prompts": ["a/b=x"]}, "write NAME=PROMPT"),
        ({"prompts": ["a=x", "a=y"]}, "is given twice"),
        ({"prompts": ["file_name=x"]}, "choose another name"),
        ({"prompts": ["replaces=x"]}, "choose another name"),
        ({"prompts": ["caption=x"]}, "choose another name"),
        ({"prompts": ["a=x"], "prompt": "y"}, "--prompt and --prompts both"),
        ({"prompt_template": "x", "task": "y"}, "--task and --prompt_template both"),
        ({"prompts": ["a=x"], "visualize": "v"}, "--visualize draws one"),
        ({"limit": 0}, "--limit must be 1 or more"),
    ],
)
def test_flags_that_cannot_work_are_refused(options, message):
    (problem,) = CaptionOptions(images=["."], **options).check()
    assert message in problem


def test_cleaned_captions_are_written(folder):
    run(folder / "0.png", save_captions=True, prompt="a,  b, A, dark", clean=["dedupe_tags"])
    assert files_of(folder) == {"0.txt": "a, b, dark dark"}

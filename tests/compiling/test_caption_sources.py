"""Captions that other tools keep in one file: which image, caption and prompt, and what cannot be used."""

import json
import os

import pytest

from caption_train.config.compiling import CompileOptions
from caption_train.data.dataset import read_dataset
from caption_train.errors import CaptionTrainError
from tests.fixtures.sample_set import compile_folder, counted, rows_of, write_image, write_pair


@pytest.fixture
def folder(tmp_path):
    """Images a.png, sub/b.png, sub/c.png; a.png has a caption beside it."""
    write_pair(tmp_path / "data/a.png", "beside")
    for name in ("sub/b.png", "sub/c.png"):
        write_image(tmp_path / "data" / name, (9, 9, ord(name[4])))
    return tmp_path / "data"


def compile_source(folder, name, content, **options):
    """Write a file of captions beside the folder, compile with it, and return the rows as tuples."""
    path = folder.parent / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert compile_folder(folder, captions=[path], overwrite=True, **options) == 0
    return [(row["file_name"], row["text"], row.get("prompt")) for row in rows_of(folder)]


LLAVA = [
    {
        "id": "1",
        "image": "train2017/sub/b.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A boat."},
            {"from": "human", "value": "What colour?"},
            {"from": "gpt", "value": "It is\nred."},
        ],
    }
]
ROWS = [
    ("a.png", "beside", None),
    ("sub/b.png", "A boat.", "What is it?"),
    ("sub/b.png", "It is red.", "What colour?"),
]


def test_llava_conversations_become_a_row_a_turn(folder, capsys):
    assert compile_source(folder, "llava.json", LLAVA) == ROWS
    assert counted(capsys, "captions in that file") == (2, [])
    pairs = read_dataset(folder)
    assert [(pair.caption, pair.prompt) for pair in pairs] == [(row[1], row[2]) for row in ROWS]


def test_messages_of_a_line_name_their_image_inside_or_outside(folder):
    asked = {
        "role": "user",
        "content": [{"type": "image", "image": "/x/sub/b.png"}, {"type": "text", "text": "Who?"}],
    }
    answered = {"role": "assistant", "content": [{"type": "text", "text": "Nobody."}]}
    system = {"role": "system", "content": "Be brief."}
    outside = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "Here."}]
    lines = [{"messages": [system, asked, answered]}, {"messages": outside, "images": ["c.png"]}]
    rows = compile_source(folder, "m.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert rows[1:] == [("sub/b.png", "Nobody.", "Who?"), ("sub/c.png", "Here.", "Where?")]


def test_all_captions_of_coco_stay(folder):
    images = [
        {"id": 7, "file_name": "b.png"},
        {"id": 8, "file_name": "c.png"},
        {"id": 9, "file_name": "gone.png"},
    ]
    said = [(7, "one"), (8, "three"), (7, "two "), (7, "one"), (9, "x"), (1, "y")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(said)]
    rows = compile_source(folder, "captions_val2017.json", {"images": images, "annotations": annotations})
    assert rows[1:] == [("sub/b.png", "one", None), ("sub/b.png", "two", None), ("sub/c.png", "three", None)]


@pytest.mark.parametrize(("name", "tab"), [("t.csv", ","), ("t.tsv", "\t")])
def test_tables_are_read_by_their_columns(folder, name, tab):
    lines = [
        ["n", "image_path", "caption", "prompt"],
        ["1", "sub/b.png", '"one, two"', ""],
        ["2", "c", "x", "Who?"],
    ]
    rows = compile_source(folder, name, "\ufeff" + "\r\n".join(tab.join(line) for line in lines))
    assert rows[1:] == [("sub/b.png", "one, two", None), ("sub/c.png", "x", "Who?")]


def test_parquet_is_read_without_its_pictures(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": b"\x89PNG" * 99, "path": "b.png"}, "text": "one"},
        {"image": {"bytes": b"", "path": "c.png"}, "text": "two"},
    ]
    path = folder.parent / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert compile_source(folder, path.name, path.read_bytes())[1:] == [
        ("sub/b.png", "one", None), ("sub/c.png", "two", None)
    ]  # fmt: skip
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CaptionTrainError, match=r"t\.parquet: ") as caught:
        compile_folder(folder, captions=[path])
    assert "\n" not in str(caught.value)


def test_a_file_goes_before_captions_beside_images_and_the_first_file_before_the_second(folder):
    first, second = folder.parent / "1.csv", folder.parent / "2.csv"
    first.write_text("file_name,text\na.png,from the first\n")
    second.write_text("file_name,text\na.png,from the second\na.png,from the first\nb.png,only here\n")
    compile_folder(folder, captions=[first, second])
    texts = [(row["file_name"], row["text"]) for row in rows_of(folder)]
    assert texts == [("a.png", "from the first"), ("a.png", "from the second"), ("sub/b.png", "only here")]


def test_prompts_can_be_left_out(folder):
    assert {row[2] for row in compile_source(folder, "llava.json", LLAVA, ignore_prompts=True)} == {None}


def test_compiling_again_loses_nothing_and_says_nothing(folder):
    compile_source(folder, "llava.json", LLAVA)
    assert compile_folder(folder, captions=[folder.parent / "llava.json"]) == 0
    with pytest.raises(CaptionTrainError, match="is left as it is"):
        compile_folder(folder)


def test_the_rows_of_an_image_are_on_one_side_of_a_split(folder):
    write_image(folder / "d.png", "blue")
    images = [{"id": name, "file_name": name} for name in ("a.png", "b.png", "c.png", "d.png")]
    said = [{"image_id": i["id"], "caption": f"{n} of {i['id']}"} for i in images for n in range(3)]
    compile_source(folder, "c.json", {"images": images, "annotations": said}, validation_split=0.5)
    sides = {}
    for row in rows_of(folder):
        sides.setdefault(row["file_name"], set()).add(row["split"])
    assert len(rows_of(folder)) == 12 and all(len(side) == 1 for side in sides.values())
    assert {side for found in sides.values() for side in found} == {"train", "validation"}


BAD = [
    (["no object", {"text": "x"}], "not an object"),
    ([{"text": "x"}], "names no image"),
    ([{"image": "gone.png", "text": "x"}], "no such image"),
    ([{"image": ["a.png", "b.png"], "text": "x"}], "2 images, not one"),
    ([{"image": "a.png", "text": " "}], "no caption"),
    ([{"image": "a.png", "text": 3}], "not a string"),
    ([{"image": "a.png", "text": "\ud83d"}], "half characters"),
    ([{"image": "a.png", "messages": [{"role": "user", "content": "x"}]}], "no answer"),
    ([{"image": "a.png", "messages": "x"}], "not a list of messages"),
    ([{"image": "a.png", "messages": [{"role": "user", "content": 3}]}], "a message without text"),
]


@pytest.mark.parametrize(("records", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_an_entry_that_cannot_be_used_is_named_and_the_others_are_used(folder, capsys, records, reason):
    rows = compile_source(folder, "x.json", [*records, {"image": "b.png", "text": "good"}])
    assert rows == [("a.png", "beside", None), ("sub/b.png", "good", None)]
    count, lines = counted(capsys, "entries not used")
    assert count >= 1 and lines[0].startswith("x.json:0: ") and reason in lines[0]


def test_a_file_without_anything_to_use_is_one_line(folder):
    for name, content in (
        *(("x.json", "{"), ("x.json", "3"), ("x.json", "[]"), ("x.json", '{"a": {"caption": "x"}}')),
        *(
            ("x.jsonl", "{}\n{"),
            ("x.csv", "a,b\n1,2\n"),
            ("x.csv", "\0"),
            ("x.parquet", "PAR1"),
            ("gone.json", None),
        ),
    ):
        path = folder.parent / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(CaptionTrainError, match=name.replace(".", r"\.")) as caught:
            compile_folder(folder, captions=[path])
        assert "\n" not in str(caught.value)
    os.mkfifo(folder.parent / "pipe.json")
    with pytest.raises(CaptionTrainError, match=r"pipe\.json: not a regular file"):
        compile_folder(folder, captions=[folder.parent / "pipe.json"])


def test_a_table_may_hold_whole_pictures_beside_its_captions(folder):
    table = f"image,text,data\nb.png,good,{'A' * 200_000}\n"
    assert compile_source(folder, "x.csv", table) == [("a.png", "beside", None), ("sub/b.png", "good", None)]


def test_a_table_may_have_semicolons_between_its_cells(folder):
    rows = compile_source(folder, "x.csv", 'file_name;text\nb.png;"one, two; three"\n')
    assert rows[1] == ("sub/b.png", "one, two; three", None)


def test_a_table_of_another_encoding_says_so(folder):
    path = folder.parent / "x.csv"
    path.write_bytes(b"file_name,text\nb.png,caf\xe9\n")
    with pytest.raises(CaptionTrainError, match="not UTF-8 text; save it as UTF-8"):
        compile_folder(folder, captions=[path])


def test_a_caption_longer_than_training_reads_is_named(folder, capsys):
    records = [{"image": "c.png", "text": "x" * 1_100_000}, {"image": "b.png", "text": "good"}]
    assert len(compile_source(folder, "x.json", records)) == 2
    assert "longer than 1 MB" in counted(capsys, "entries not used")[1][0]


def test_flags_that_cannot_work_are_refused(folder):
    (ending,) = CompileOptions(folder, captions=[folder / "x.txt"]).check()
    assert "must end in .json, .jsonl, .csv, .tsv, .parquet" in ending
    (alone,) = CompileOptions(folder, ignore_prompts=True).check()
    assert "--ignore_prompts" in alone

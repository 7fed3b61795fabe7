"""One file of all captions: its rows, its journals, its order."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.captioning.caption_file import CaptionFile
from caption_train.errors import CaptionTrainError, UsageError


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_written_in_the_order_of_the_images(tmp_path):
    file = CaptionFile(tmp_path / "captions.jsonl")
    for name in ("b", "a", "c"):
        file.append(tmp_path / name, f"text {name}")
    file.merge([tmp_path / name for name in "abc"])
    assert [row["file_name"] for row in rows_of(file.path)] == ["a", "b", "c"]


def test_rows_of_other_images_stay_first_with_all_their_columns(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "z.png", "text": "old", "tags": "x"}\n{"file_name": "a.png", "n": 1}\n')
    file = CaptionFile(path)
    file.append(tmp_path / "a.png", "new")
    file.merge([tmp_path / "a.png"])
    assert rows_of(path) == [
        {"file_name": "z.png", "text": "old", "tags": "x"},
        {"file_name": "a.png", "n": 1, "text": "new"},
    ]


def test_a_new_caption_drops_the_remarks_of_the_old_one(tmp_path):
    for remarks in (["cut"], []):
        file = CaptionFile(tmp_path / "captions.jsonl")
        file.append(tmp_path / "a.png", "text", remarks=remarks, answer={"boxes": []} if remarks else None)
        file.merge([tmp_path / "a.png"])
        file.discard_journals()
    assert rows_of(file.path) == [{"file_name": "a.png", "text": "text"}]


def test_a_killed_run_leaves_its_rows_but_not_its_half_line(tmp_path):
    killed = CaptionFile(tmp_path / "captions.jsonl")
    killed.append(tmp_path / "a.png", "one")
    killed.append(tmp_path / "b.png", "two")
    journal = next(tmp_path.glob(".captions.jsonl.*"))
    journal.write_bytes(journal.read_bytes()[:-5])
    assert list(CaptionFile(tmp_path / "captions.jsonl").read()) == ["a.png"]


def test_rows_after_the_half_line_of_a_killed_run_are_read(tmp_path):
    path = tmp_path / "captions.jsonl"
    (tmp_path / ".captions.jsonl.0.part").write_text('{"file_name": "a.png", "te')
    CaptionFile(path).append(tmp_path / "b.png", "two")
    assert list(CaptionFile(path).read()) == ["b.png"]


def test_a_journal_cut_within_a_character_is_read_up_to_there(tmp_path):
    (tmp_path / ".captions.jsonl.0.part").write_bytes(
        b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "caf\xc3'
    )
    assert CaptionFile(tmp_path / "captions.jsonl").read() == {"a.png": "one"}


def test_several_rows_of_one_image_all_stay(tmp_path):
    path = tmp_path / "metadata.jsonl"
    rows = [{"file_name": "a.png", "text": f"{i}", "prompt": f"p{i}"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = CaptionFile(path)
    file.append(tmp_path / "b.png", "new")
    file.merge([tmp_path / "a.png", tmp_path / "b.png"])
    assert rows_of(path) == [*rows, {"file_name": "b.png", "text": "new"}]


def test_a_new_caption_goes_into_every_row_of_its_image(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "old", "n": 1}\n' * 3)
    file = CaptionFile(path)
    file.append(tmp_path / "a.png", "new")
    file.merge([tmp_path / "a.png"])
    assert rows_of(path) == [{"file_name": "a.png", "n": 1, "text": "new"}] * 3


def test_a_row_without_a_caption_is_none(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '{"file_name": "a.png", "n": 1}\n{"file_name": "b.png", "text": null}\n'
        '{"file_name": "c.png", "caption": "old"}\n'
    )
    assert CaptionFile(path).read() == {"c.png": "old"}


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_name_that_no_row_can_hold_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\\udcff\.png has a name that is not UTF-8"):
        CaptionFile(tmp_path / "captions.csv").name_of(tmp_path / os.fsdecode(b"\xff.png"))


def test_journals_of_several_processes_become_one_file(tmp_path):
    path = tmp_path / "captions.jsonl"
    for rank in range(3):
        CaptionFile(path, rank).append(tmp_path / f"{rank}.png", f"by {rank}")
    file = CaptionFile(path)
    file.merge([tmp_path / f"{rank}.png" for rank in range(3)])
    file.discard_journals()
    assert [row["text"] for row in rows_of(path)] == ["by 0", "by 1", "by 2"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_dataset_cannot_reach_outside_its_folder(tmp_path):
    (tmp_path / "data").mkdir()
    file = CaptionFile(tmp_path / "data" / "metadata.jsonl")
    with pytest.raises(UsageError, match="cannot reach outside"):
        file.name_of(tmp_path / "a.png")
    assert CaptionFile(tmp_path / "data" / "c.jsonl").name_of(tmp_path / "a.png") == str(tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"no json\n", b'["a"]\n', b'{"image": "a.png"}\n', b"\xff\xfe"])
def test_a_file_that_cannot_be_continued_is_refused_untouched(tmp_path, data):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"captions\.jsonl"):
        CaptionFile(path).read()
    assert path.read_bytes() == data


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_and_the_journal_still_closes(tmp_path):
    (tmp_path / ".captions.jsonl.0.part").symlink_to("/dev/full")
    file = CaptionFile(tmp_path / "captions.jsonl")
    with pytest.raises(CaptionTrainError, match="No space left on device"):
        file.append(tmp_path / "a.png", "text")
    file.discard_journals()


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(CaptionTrainError, match="No such file or directory"):
        CaptionFile(tmp_path / "gone" / "captions.csv").append(tmp_path / "a.png", "text")


TEXTS = st.text(st.sampled_from("aé😀 ,;\"'\\\n\r\t\u2028\x85\x1c"), max_size=9)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@given(texts=st.lists(TEXTS, max_size=5))
def test_any_text_comes_back_from_journal_and_file(tmp_path_factory, suffix, texts):
    folder = tmp_path_factory.mktemp("any")
    file = CaptionFile(folder / f"captions{suffix}")
    names = [folder / f"{i}.png" for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        file.append(name, text)
    assert [*file.read().values()] == texts
    file.merge(names)
    file.discard_journals()
    assert [*CaptionFile(file.path).read().values()] == texts


def test_csv_holds_answers_as_json(tmp_path):
    file = CaptionFile(tmp_path / "captions.csv")
    file.append(tmp_path / "a.png", "cat", answer={"labels": ["cat"]})
    file.append(tmp_path / "b.png", "dog")
    file.merge([tmp_path / "a.png", tmp_path / "b.png"])
    with file.path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [json.loads(row["answer"] or "null") for row in rows] == [{"labels": ["cat"]}, None]

"""One file of all captions: its rows, its journals, its order."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.captioning.outputs import Caption
from caption_train.captioning.sinks.caption_file import CaptionFile
from caption_train.captioning.sinks.existing import Existing
from caption_train.captioning.sinks.row_file import RowFile
from caption_train.errors import CaptionTrainError, UsageError


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_written_in_the_order_of_the_images(tmp_path):
    file = CaptionFile(tmp_path / "captions.jsonl")
    for name in ("b", "a", "c"):
        file.write(Caption(tmp_path / name, f"text {name}"))
    file.finish([tmp_path / name for name in "abc"])
    assert [row["file_name"] for row in rows_of(file.path)] == ["a", "b", "c"]


def test_rows_of_other_images_stay_first_with_all_their_columns(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "z.png", "text": "old", "tags": "x"}\n{"file_name": "a.png", "n": 1}\n')
    file = CaptionFile(path)
    file.write(Caption(tmp_path / "a.png", "new"))
    file.finish([tmp_path / "a.png"])
    assert rows_of(path) == [
        {"file_name": "z.png", "text": "old", "tags": "x"},
        {"file_name": "a.png", "n": 1, "text": "new"},
    ]


def overwrite(path, image, text, **more):
    """Caption an image as `--overwrite` does; return the names that others have captioned meanwhile."""
    file = CaptionFile(path, existing=Existing("overwrite"))
    file.pending([image])
    file.begin([image])
    file.write(Caption(image, text, **more))
    kept = file.finish([image])
    file.close()
    return kept


def test_a_new_caption_drops_the_remarks_of_the_old_one(tmp_path):
    path = tmp_path / "captions.jsonl"
    for remarks in (["cut"], []):
        answer = {"boxes": []} if remarks else None
        overwrite(path, tmp_path / "a.png", "text", remarks=remarks, answer=answer)
    assert rows_of(path) == [{"file_name": "a.png", "text": "text"}]


def test_a_killed_run_leaves_its_rows_but_not_its_half_line(tmp_path):
    killed = CaptionFile(tmp_path / "captions.jsonl")
    killed.write(Caption(tmp_path / "a.png", "one"))
    killed.write(Caption(tmp_path / "b.png", "two"))
    journal = next(tmp_path.glob(".captions.jsonl.*"))
    journal.write_bytes(journal.read_bytes()[:-5])
    assert list(CaptionFile(tmp_path / "captions.jsonl").captions()) == ["a.png"]


def test_rows_after_the_half_line_of_a_killed_run_are_read(tmp_path):
    path = tmp_path / "captions.jsonl"
    (tmp_path / ".captions.jsonl.0.part").write_text('{"file_name": "a.png", "te')
    CaptionFile(path).write(Caption(tmp_path / "b.png", "two"))
    assert list(CaptionFile(path).captions()) == ["b.png"]


def test_a_journal_cut_within_a_character_is_read_up_to_there(tmp_path):
    (tmp_path / ".captions.jsonl.0.part").write_bytes(
        b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "caf\xc3'
    )
    assert CaptionFile(tmp_path / "captions.jsonl").captions() == {"a.png": "one"}


def test_the_journal_of_a_file_with_a_longer_name_is_left_to_it(tmp_path):
    other = CaptionFile(tmp_path / "a.jsonl.b.jsonl")
    other.pending([])
    other.write(Caption(tmp_path / "theirs.png", "theirs"))
    file = CaptionFile(tmp_path / "a.jsonl")
    file.pending([])
    file.write(Caption(tmp_path / "ours.png", "ours"))
    file.finish([])
    assert [row["text"] for row in rows_of(tmp_path / "a.jsonl")] == ["ours"]
    other.finish([])
    assert [row["text"] for row in rows_of(tmp_path / "a.jsonl.b.jsonl")] == ["theirs"]


def test_several_rows_of_one_image_all_stay(tmp_path):
    path = tmp_path / "metadata.jsonl"
    rows = [{"file_name": "a.png", "text": f"{i}", "prompt": f"p{i}"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = CaptionFile(path)
    file.write(Caption(tmp_path / "b.png", "new"))
    file.finish([tmp_path / "a.png", tmp_path / "b.png"])
    assert rows_of(path) == [*rows, {"file_name": "b.png", "text": "new"}]


def test_a_new_caption_goes_into_every_row_of_its_image(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "old", "n": 1}\n' * 3)
    overwrite(path, tmp_path / "a.png", "new")
    assert rows_of(path) == [{"file_name": "a.png", "n": 1, "text": "new"}] * 3


def test_a_row_without_a_caption_is_none(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '{"file_name": "a.png", "n": 1}\n{"file_name": "b.png", "text": null}\n'
        '{"file_name": "c.png", "caption": "old"}\n'
    )
    assert CaptionFile(path).captions() == {"c.png": "old"}


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_journals_of_several_processes_become_one_file(tmp_path):
    path = tmp_path / "captions.jsonl"
    for rank in range(3):
        CaptionFile(path, rank).write(Caption(tmp_path / f"{rank}.png", f"by {rank}"))
    file = CaptionFile(path)
    file.finish([tmp_path / f"{rank}.png" for rank in range(3)])
    assert [row["text"] for row in rows_of(path)] == ["by 0", "by 1", "by 2"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_and_the_journal_still_closes(tmp_path):
    file = CaptionFile(tmp_path / "captions.jsonl")
    file._journal._descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(CaptionTrainError, match="No space left on device"):
        file.write(Caption(tmp_path / "a.png", "text"))
    file.finish([])


@pytest.mark.parametrize("made", ["folder", "link", "link to nothing", "pipe"])
def test_a_journal_that_is_no_file_of_ours_is_one_line_and_stays(tmp_path, made):
    path, outside = tmp_path / "in" / ".captions.jsonl.0.part", tmp_path / "outside"
    path.parent.mkdir()
    if made == "link":
        outside.write_text("theirs")
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(made, lambda: path.symlink_to(outside))()
    for work in (
        lambda file: file.pending([]),
        lambda file: file.write(Caption(path.parent / "a.png", "text")),
    ):
        file = CaptionFile(path.parent / "captions.jsonl")
        with pytest.raises(
            CaptionTrainError, match=r"0\.part.*(Is a directory|is a link|is no regular file)"
        ):
            work(file)
        file.close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert outside.read_text() == "theirs" if made == "link" else not outside.exists()


def test_an_output_that_is_a_link_is_written_through_and_one_to_nothing_is_refused(tmp_path):
    real, path = tmp_path / "elsewhere" / "real.jsonl", tmp_path / "in" / "captions.jsonl"
    real.parent.mkdir()
    path.parent.mkdir()
    path.symlink_to(real)
    with pytest.raises(UsageError, match="is a link to nothing"):
        CaptionFile(path).pending([])
    assert not real.exists()
    real.write_text("")
    file = CaptionFile(path)
    file.write(Caption(path.parent / "a.png", "text"))
    file.finish([])
    assert path.is_symlink() and len(rows_of(real)) == 1


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(CaptionTrainError, match="No such file or directory"):
        CaptionFile(tmp_path / "gone" / "captions.csv").write(Caption(tmp_path / "a.png", "text"))


TEXTS = st.text(st.sampled_from("aé😀 ,;\"'\\\n\r\t\u2028\x85\x1c"), max_size=9)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@given(texts=st.lists(TEXTS, max_size=5))
def test_any_text_comes_back_from_journal_and_file(tmp_path_factory, suffix, texts):
    folder = tmp_path_factory.mktemp("any")
    file = CaptionFile(folder / f"captions{suffix}")
    names = [folder / f"{i}.png" for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        file.write(Caption(name, text))
    assert [*file.captions().values()] == texts
    file.finish(names)
    assert [*CaptionFile(file.path).captions().values()] == texts


def test_csv_holds_answers_as_json(tmp_path):
    file = CaptionFile(tmp_path / "captions.csv")
    file.write(Caption(tmp_path / "a.png", "cat", answer={"labels": ["cat"]}))
    file.write(Caption(tmp_path / "b.png", "dog"))
    file.finish([tmp_path / "a.png", tmp_path / "b.png"])
    with file.path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [json.loads(row["answer"] or "null") for row in rows] == [{"labels": ["cat"]}, None]


def test_a_row_that_somebody_captions_while_the_run_is_at_work_wins(tmp_path):
    path, images = tmp_path / "captions.jsonl", [tmp_path / "a.png", tmp_path / "b.png"]
    path.write_text('{"file_name": "a.png"}\n')
    file = CaptionFile(path)
    assert file.pending(images) == images
    for image in images:
        file.write(Caption(image, "by the model"))
    by_hand = '{"file_name": "a.png", "text": "by hand"}\n{"file_name": "new.png", "text": "by hand"}\n'
    path.write_text(by_hand)
    assert file.finish(images) == [str(tmp_path / "a.png")]
    file.close()
    assert [row["text"] for row in rows_of(path)] == ["by hand", "by hand", "by the model"]


def test_even_overwrite_keeps_what_was_written_after_it_began(tmp_path):
    path, image = tmp_path / "captions.csv", tmp_path / "a.png"
    path.write_text("file_name,text\na.png,old\n")
    assert overwrite(path, image, "new") == []
    file = CaptionFile(path, existing=Existing("overwrite"))
    file.pending([image])
    file.begin([image])
    file.write(Caption(image, "newer"))
    path.write_text("file_name,text\na.png,by hand\n")
    assert file.finish([image]) == [str(image)]
    file.close()
    assert path.read_text() == "file_name,text\na.png,by hand\n"


def test_a_killed_overwrite_is_finished_by_the_next_run(tmp_path):
    path, image = tmp_path / "captions.jsonl", tmp_path / "a.png"
    path.write_text('{"file_name": "a.png", "text": "old"}\n')
    killed = CaptionFile(path, existing=Existing("overwrite"))
    killed.begin([image])
    killed.write(Caption(image, "new"))
    file = CaptionFile(path)
    assert file.pending([image]) == [] and file.finish([image]) == []
    file.close()
    assert rows_of(path) == [{"file_name": "a.png", "text": "new"}]


def test_what_is_saved_at_the_moment_of_merging_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file_name": "z.png", "text": "old"}\n')
    file = CaptionFile(path)
    file.write(Caption(tmp_path / "a.png", "new"))
    read = RowFile._read_table

    def read_then_save(self, merge):
        table = read(self, merge)
        monkeypatch.undo()
        path.write_text('{"file_name": "z.png", "text": "by hand"}\n')
        return table

    monkeypatch.setattr(RowFile, "_read_table", read_then_save)
    file.finish([])
    assert [row["text"] for row in rows_of(path)] == ["by hand", "new"]

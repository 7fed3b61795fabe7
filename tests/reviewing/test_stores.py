"""Captions are written whole or not at all, and never over what comes at the last moment."""

import json
import os
import sys

import pytest

from caption_train.errors import UsageError
from caption_train.reviewing.history import HISTORY_NAME, History
from caption_train.reviewing.items import Library
from caption_train.reviewing.stores import Change, FileStore, MetadataStore, open_store
from caption_train.system.exclusive import Signature, remove_unchanged


def item_of(library, name):
    return next(item for item in library.values() if item.name == name)


@pytest.fixture
def library(folder):
    return Library(folder)


def test_what_is_written_between_the_check_and_the_write_stays(library, folder, monkeypatch):
    """As an editor would save while we write; for a new file, a changed one and a removed one."""
    from caption_train.reviewing import stores

    changes = [
        ("c.png", "", "mine"),
        ("a.png", "cat, sofa", "mine"),
        ("b.png", "cat, window, morning light", ""),
    ]
    for name in ("create_atomically", "replace_unchanged", "remove_unchanged"):
        real = getattr(stores, name)

        def write_first(path, *rest, real=real):
            if path.read_text() != "theirs\n" if path.exists() else True:
                path.write_text("theirs\n")
            return real(path, *rest)

        monkeypatch.setattr(stores, name, write_first)
    store = FileStore(library, ".txt")
    outcomes = store.write([Change(item_of(library, name), base, text) for name, base, text in changes])
    assert [outcome.theirs for outcome in outcomes] == ["theirs"] * 3
    assert [(folder / f"{name}.txt").read_text() for name in "abc"] == ["theirs\n"] * 3


def test_a_row_that_is_written_meanwhile_is_kept(library, folder, monkeypatch):
    from caption_train.reviewing import stores

    path = folder / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n')
    store, real, times = MetadataStore(library), stores.replace_unchanged, []

    def write_first(target, *rest):
        times.append(1)
        if len(times) == 1:
            path.write_text(path.read_text().replace("two", "theirs"))
        return real(target, *rest)

    monkeypatch.setattr(stores, "replace_unchanged", write_first)
    changes = [
        Change(item_of(library, "a.png"), "one", "new"),
        Change(item_of(library, "b.png"), "two", "new"),
    ]
    first, second = store.write(changes)
    assert first.is_done and second.theirs == "theirs"
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["new", "theirs"]


def test_of_several_captions_of_an_image_the_one_that_is_shown_changes(library, folder):
    path = folder / "metadata.jsonl"
    path.write_text(
        "".join(f'{{"file_name": "a.png", "text": "{text}"}}\n' for text in ("one", "two", "one"))
    )
    store = MetadataStore(library)
    assert store.write([Change(item_of(library, "a.png"), "one", "new")])[0].is_done
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["new", "two", "new"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"\n[1"])
def test_a_damaged_metadata_file_is_refused_and_left_alone(library, folder, content):
    (folder / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be edited"):
        open_store(library, "auto", ".txt")
    assert (folder / "metadata.jsonl").read_bytes() == content


def test_a_file_that_was_written_since_is_not_removed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    was = Signature.of(path)
    path.write_text("another")
    assert not remove_unchanged(path, was) and path.read_text() == "another"
    assert remove_unchanged(path, Signature.of(path)) and not list(tmp_path.iterdir())
    assert remove_unchanged(path, was)


def test_a_file_that_is_written_while_it_is_removed_comes_back(tmp_path, monkeypatch):
    from caption_train.system import exclusive

    path = tmp_path / "a.txt"
    path.write_text("one")
    was, real = Signature.of(path), exclusive.Signature.of

    def write_after_the_check(of):
        found = real(of)
        if of == path:
            path.write_text("at the last moment")
        return found

    monkeypatch.setattr(exclusive.Signature, "of", write_after_the_check)
    assert not remove_unchanged(path, was)
    monkeypatch.undo()
    assert path.read_text() == "at the last moment" and list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_a_history_that_goes_on(folder):
    history = History(folder)
    history.begin("edit", [("a.png", "one", "two")])
    path = folder / HISTORY_NAME
    with path.open("a") as file:
        file.write('{"batch": "cut of')
    again = History(folder)
    assert again.last().edits["a.png"].after == "two"
    again.begin("edit", [("b.png", "three", "four")])
    assert [list(batch.edits) for batch in History(folder).batches.values()] == [["a.png"], ["b.png"]]


@pytest.mark.parametrize(
    "line",
    [
        *("1", "[]", '{"action": "mark"}', '{"name": 1}', '{"name": "a", "action": []}'),
        *('{"name": "a", "action": "void", "batch": []}', '{"name": "a", "action": "void"}'),
        '{"name": "a", "action": "edit", "time": "", "batch": "b", "before": "", "after": 1, "undoes": {}}',
        '{"name": "a", "action": "mark", "accepted": [], "batch": {}, "time": [], "undoes": []}',
    ],
)
def test_a_line_of_the_history_that_makes_no_sense_is_passed_over(folder, line):
    (folder / HISTORY_NAME).write_text(line + "\n")
    assert History(folder).last() is None


def test_an_edit_that_was_not_made_is_not_undone(library, folder):
    history = History(folder)
    batch = history.begin("edit", [("a.png", "one", "two"), ("b.png", "one", "two")])
    history.void(batch, ["a.png", "b.png"])
    assert history.last() is None and History(folder).last() is None


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_name_that_is_not_utf8_can_be_edited_in_files_not_in_rows(folder):
    name = os.fsdecode(b"\xff.png")
    (folder / "c.png").rename(folder / name)
    library = Library(folder)
    item = item_of(library, name)
    assert FileStore(library, ".txt").write([Change(item, "", "odd")])[0].is_done
    assert (folder / os.fsdecode(b"\xff.txt")).read_text() == "odd\n"
    (folder / "metadata.jsonl").write_text("")
    assert "UTF-8" in MetadataStore(library).write([Change(item, "", "odd")])[0].problem
    history = History(folder)
    history.begin("edit", [(name, "", "odd")])
    assert name in History(folder).last().edits


def test_where_nothing_can_be_written_it_is_said(library, folder, monkeypatch):
    from caption_train.reviewing import stores

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "replace_unchanged", full)
    outcome = FileStore(library, ".txt").write([Change(item_of(library, "a.png"), "cat, sofa", "new")])[0]
    assert "No space left" in outcome.problem and (folder / "a.txt").read_text() == "cat, sofa\n"

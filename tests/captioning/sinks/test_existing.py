"""Adding to captions that exist: once, however a run is killed, never to what a person writes meanwhile."""

import itertools
import json
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from caption_train.captioning.outputs import Caption
from caption_train.captioning.plan import open_keyed_outputs
from caption_train.captioning.sinks import caption_file, existing, row_file, sidecars
from caption_train.captioning.sinks.existing import Existing
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from tests.fixtures.fake_family import FakeFamily

OLD = {"0.png": "a dog", "1.png": "A cat.\nIt sits.", "2.png": None, "sub/3.png": "猫"}
NAMES = ["0.png", "1.png", "2.png", "3.png"]
APPENDED = {"0.png": "a dog, new 0.png", "1.png": "A cat.\nIt sits. new 1.png", "2.png": "new 2.png"}
APPENDED |= {"sub/3.png": "猫, new 3.png"}


@pytest.fixture
def images(tmp_path):
    """Four images; three have captions beside them and in captions.jsonl."""
    rows = []
    (tmp_path / "sub").mkdir()
    for name, caption in OLD.items():
        (tmp_path / name).touch()
        if caption:
            (tmp_path / name).with_suffix(".txt").write_text(caption + "\n")
            rows.append({"file_name": name, "text": caption, "n": 1.50})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / name for name in OLD]


def open_run(images, **options):
    folder = images[0].parent
    settings = {"images": ["."], "save_captions": True, "output": folder / "captions.jsonl"}
    return open_keyed_outputs(CaptionOptions(**settings | {"existing": "append"} | options), FakeFamily())


def caption(images, meanwhile=lambda: None, make=lambda image: f"new {image.name}", done=True, **options):
    """Do what a run does; return (images that it captioned, names that others have captioned meanwhile)."""
    with closing(open_run(images, **options)) as outputs:
        outputs.open(images)
        pending = outputs.find_lacking(images)
        outputs.begin(images)
        meanwhile()
        kept = [i.name for i, key in pending if not outputs.write(Caption(i, make(i)), key)]
        kept += outputs.finish(images, done=done)
    return [image.name for image, _ in pending], kept


def read_all(images):
    """Return the captions in files, and those in rows."""
    folder = images[0].parent
    paths = {image.relative_to(folder).as_posix(): image.with_suffix(".txt") for image in images}
    files = {name: path.read_text().strip() for name, path in paths.items() if path.exists()}
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    return files, {row["file_name"]: row["text"] for row in rows}


def hidden(images):
    return sorted(path.name for path in images[0].parent.rglob(".*"))


def test_new_captions_follow_those_that_exist_in_files_and_rows(images):
    assert caption(images) == (NAMES, [])
    assert read_all(images) == (APPENDED, APPENDED)
    assert '"n": 1.5' in (images[0].parent / "captions.jsonl").read_text()
    assert hidden(images) == []


def test_new_captions_precede_those_that_exist(images):
    caption(images, existing="prepend", separator=" | ")
    expected = {n: " | ".join(filter(None, [f"new {n.removeprefix('sub/')}", old])) for n, old in OLD.items()}
    assert read_all(images) == (expected, expected)


@pytest.mark.parametrize("outputs", [{"save_captions": False}, {"output": None}, {}])
def test_a_run_killed_at_any_moment_adds_to_no_caption_twice(images, outputs):
    """Killed at the first moment that it touches a file, the second, … until none is left to be killed at."""
    folder = images[0].parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for moment in itertools.count(1):
        for path in folder.rglob("*"):
            if path.is_file():
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        child = os.fork()
        if not child:
            _die_at(moment)
            caption(images, **outputs)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not killed:
            break
        assert caption(images, **outputs)[1] == []
        files, rows = read_all(images)
        assert files == (
            APPENDED if outputs.get("save_captions", True) else {n: c for n, c in OLD.items() if c}
        )
        assert rows == (APPENDED if outputs.get("output", True) else {n: c for n, c in OLD.items() if c})
        assert hidden(images) == []
    assert moment > 9


@pytest.mark.parametrize("outputs", [{"save_captions": False}, {"output": None}, {}])
def test_a_run_with_several_prompts_killed_at_any_moment_adds_to_no_caption_twice(images, outputs):
    folder = images[0].parent
    image, output, files = images[0], folder / "captions.jsonl", [folder / "0.a.txt", folder / "0.b.txt"]
    for moment in itertools.count(1):
        output.write_text('{"file_name": "0.png", "a": "old", "b": "old"}\n')
        for path in files:
            path.write_text("old\n")
        child = os.fork()
        if not child:
            _die_at(moment)
            caption([image], prompts=["a=x", "b=y"], **outputs)
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break
        caption([image], prompts=["a=x", "b=y"], **outputs)
        row, added = json.loads(output.read_text()), "old, new 0.png"
        assert (row["a"], row["b"]) == ((added,) * 2 if outputs.get("output", True) else ("old",) * 2), moment
        texts = [path.read_text().strip() for path in files]
        assert texts == ([added] * 2 if outputs.get("save_captions", True) else ["old"] * 2), moment
        assert hidden(images) == []
    assert moment > 9


def _die_at(moment):
    calls = iter(range(moment - 1))

    def dying(function):
        def run(*arguments, **settings):
            # Once the last log is gone the run is over, although locks are not released yet.
            is_lock = str(arguments[0]).endswith(".lock")
            if not is_lock and next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return run

    targets = [
        (existing.AddedLog, ("note", "mark_done", "discard")),
        (sidecars, ("replace_unchanged", "create_atomically")),
        (row_file, ("replace_unchanged", "create_atomically")),
        (caption_file.CaptionFile, ("_append", "_discard_journals")),
        (Path, ("unlink",)),
    ]
    for owner, names in targets:
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))


def test_what_was_added_before_an_interrupt_is_not_captioned_again(images):
    caption(images[:2], done=False)
    assert caption(images) == (["2.png", "3.png"], [])
    assert read_all(images) == (APPENDED, APPENDED)


def test_a_person_who_goes_on_after_a_kill_keeps_what_they_wrote(images):
    caption(images[:1], done=False)
    (images[0].parent / "0.txt").write_text("a dog, new 0.png, corrected\n")
    pending, _ = caption(images)
    assert pending == ["1.png", "2.png", "3.png"]
    assert read_all(images)[0]["0.png"] == "a dog, new 0.png, corrected"


def test_what_a_person_writes_while_the_run_works_stays(images):
    folder = images[0].parent
    output = folder / "captions.jsonl"

    def write():
        (folder / "0.txt").write_text("by hand")
        (folder / "2.txt").write_text("by hand too")
        output.write_text(output.read_text().replace('"a dog"', '"by hand"'))

    _, kept = caption(images, write)
    assert {Path(name).name for name in kept} == {"0.png", "2.png"}
    files, rows = read_all(images)
    assert files == APPENDED | {"0.png": "by hand", "2.png": "by hand too"}
    assert rows == APPENDED | {"0.png": "by hand"}


def test_another_addition_is_another_run(images, capsys):
    caption(images[:2], done=False)
    pending, _ = caption(images, make=lambda image: "more", prompt="other")
    assert pending == NAMES
    assert "2 captions" in capsys.readouterr().err
    assert read_all(images)[0]["0.png"] == "a dog, new 0.png, more"
    assert hidden(images) == []


def test_a_run_that_keeps_captions_leaves_an_unfinished_one_its_log(images):
    caption(images[:2], done=False)
    caption(images, existing="keep")
    assert [name for name in hidden(images) if name.endswith(".added")]
    assert caption(images)[0] == ["2.png", "3.png"]


def test_overwrite_ends_an_unfinished_addition(images):
    caption(images[:2], done=False)
    caption(images, existing="overwrite", make=lambda image: "whole")
    assert hidden(images) == []
    assert caption(images)[0] == NAMES
    assert read_all(images)[0]["0.png"] == "whole, new 0.png"


def test_all_rows_of_an_image_keep_their_own_captions(images):
    output = images[0].parent / "captions.jsonl"
    rows = ["one", "two", "one, x"]
    output.write_text("".join(json.dumps({"file_name": "0.png", "text": text}) + "\n" for text in rows))
    for _ in range(2):
        caption(images[:1], make=lambda image: "x", done=False)
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert texts == ["one, x", "two, x", "one, x"]


def test_nothing_is_added_to_what_cannot_be_read(images):
    (images[0].parent / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"0\.txt: nothing can be added to this caption: not UTF-8"):
        caption(images)
    assert (images[0].parent / "0.txt").read_bytes() == b"caf\xe9"
    assert hidden(images) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"existing": "append", "overwrite": True, "save_captions": True},
            "--overwrite and --existing append",
        ),
        ({"existing": "prepend"}, "give --save_captions or --output"),
        ({"separator": "; "}, "--separator only"),
    ],
)
def test_flags_that_say_two_things_are_refused(options, message):
    assert any(message in problem for problem in CaptionOptions(images=["."], **options).check())


def test_overwrite_is_a_name_of_existing_overwrite():
    both = [CaptionOptions(images=["."], **o) for o in ({"overwrite": True}, {"existing": "overwrite"})]
    assert {Existing.from_options(options).mode for options in both} == {"overwrite"}
    assert all(options.replaces and not options.check() for options in both)

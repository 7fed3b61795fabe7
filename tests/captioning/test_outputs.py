"""Files beside the images: which name, what is kept, what is copied from the other output."""

import json
import subprocess
import sys

import pytest

from caption_train.captioning.outputs import Caption, wrap_caption
from caption_train.captioning.plan import open_outputs
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.paths import REPOSITORY


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / name for name in ("a b.png", "ü😀.jpg", "c.d.webp")]
    for path in paths:
        path.touch()
    return paths


def save(images, meanwhile=lambda: None, **options):
    """Caption images; return the names of those that got a caption `meanwhile`."""
    outputs = open_outputs(CaptionOptions(images=["."], **options), FakeFamily())
    outputs.open(images)
    pending = outputs.find_lacking(images)
    outputs.begin(images)
    meanwhile()
    kept = [image.name for image in pending if not outputs.write(Caption(image, f"of {image.name}"))]
    kept += outputs.finish(images)
    outputs.close()
    return kept


def test_caption_files_take_the_stem_of_the_image(images):
    save(images, save_captions=True)
    assert {p.name for p in images[0].parent.glob("*.txt")} == {"a b.txt", "ü😀.txt", "c.d.txt"}


def test_two_images_with_one_stem_get_a_file_each(tmp_path, images):
    twin = tmp_path / "a b.jpg"
    twin.touch()
    save([*images, twin], save_captions=True)
    assert (tmp_path / "a b.png.txt").read_text() == "of a b.png\n"
    assert (tmp_path / "a b.jpg.txt").read_text() == "of a b.jpg\n"
    assert not (tmp_path / "a b.txt").exists()


def test_an_image_named_after_another_leaves_it_its_caption(tmp_path):
    images = [tmp_path / name for name in ("x.jpg", "x.jpg.webp")]
    for image in images:
        image.touch()
    (tmp_path / "x.jpg.txt").write_text("by hand\n")
    save(images, save_captions=True)
    assert (tmp_path / "x.jpg.txt").read_text() == "by hand\n"
    assert (tmp_path / "x.jpg.webp.txt").read_text() == "of x.jpg.webp\n"
    save(images, save_captions=True, overwrite=True)
    assert (tmp_path / "x.jpg.txt").read_text() == "of x.jpg\n"
    assert (tmp_path / "x.jpg.webp.txt").read_text() == "of x.jpg.webp\n"


@pytest.mark.parametrize("stem", ["n" * 251, "😀" * 62])
def test_the_longest_names_have_captions(tmp_path, stem):
    image = tmp_path / f"{stem}.png"
    image.touch()
    save([image], save_captions=True)
    assert (tmp_path / f"{stem}.txt").read_text() == f"of {image.name}\n"


def test_a_caption_with_the_full_name_is_kept_and_overwritten(tmp_path, images):
    (tmp_path / "a b.png.txt").write_text("by hand")
    save(images, save_captions=True)
    assert (tmp_path / "a b.png.txt").read_text() == "by hand"
    save(images, save_captions=True, overwrite=True)
    assert (tmp_path / "a b.png.txt").read_text() == "of a b.png\n"
    assert not (tmp_path / "a b.txt").exists()


def test_an_empty_caption_file_is_kept(tmp_path, images):
    (tmp_path / "a b.txt").touch()
    save(images, save_captions=True)
    assert (tmp_path / "a b.txt").read_text() == ""


def test_a_linked_caption_file_keeps_its_link(tmp_path, images):
    (tmp_path / "elsewhere").write_text("old")
    (tmp_path / "a b.txt").symlink_to(tmp_path / "elsewhere")
    save(images, save_captions=True, overwrite=True)
    assert (tmp_path / "a b.txt").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "of a b.png\n"


def test_what_one_output_has_the_other_gets(tmp_path, images):
    output = tmp_path / "captions.jsonl"
    (tmp_path / "a b.txt").write_text("by hand\n")
    output.write_text(json.dumps({"file_name": "ü😀.jpg", "text": "in the file"}) + "\n")
    save(images, save_captions=True, output=output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["by hand", "in the file", "of c.d.webp"]
    assert (tmp_path / "ü😀.txt").read_text() == "in the file\n"


def test_overwrite_replaces_rows_and_keeps_what_killed_runs_left_of_other_images(tmp_path, images):
    output = tmp_path / "captions.jsonl"
    (tmp_path / ".captions.jsonl.4.part").write_text('{"file_name": "gone.png", "text": "x"}\n')
    output.write_text(json.dumps({"file_name": "a b.png", "text": "old"}) + "\n")
    save(images, output=output, overwrite=True)
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [
        "x",
        *(f"of {image.name}" for image in images),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs record locks")
def test_a_file_that_another_run_writes_is_refused_until_that_ends(tmp_path, images):
    output = tmp_path / "captions.jsonl"
    code = f"""if True:
        from pathlib import Path
        from caption_train.captioning.sinks.caption_file import CaptionFile
        from caption_train.captioning.outputs import Caption
        file, image = CaptionFile(Path({str(output)!r})), Path({str(images[0])!r})
        file.pending([image])
        file.write(Caption(image, "theirs"))
        print("locked", flush=True)
        input()
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, cwd=REPOSITORY) as other:
        other.stdout.readline()
        with pytest.raises(CaptionTrainError, match=r"--output .*captions.jsonl: another run"):
            save(images, output=output)
        assert (tmp_path / ".captions.jsonl.0.part").exists()
        other.kill()
    save(images, output=output)
    assert "theirs" in output.read_text()
    assert not list(tmp_path.glob(".captions*"))


def test_a_caption_that_comes_while_the_run_is_at_work_stays(tmp_path, images):
    by_hand = tmp_path / "a b.txt"
    assert save(images, lambda: by_hand.write_text("by hand\n"), save_captions=True) == ["a b.png"]
    assert by_hand.read_text() == "by hand\n"
    assert (tmp_path / "c.d.txt").read_text() == "of c.d.webp\n"


def test_a_caption_with_the_full_name_counts_too_when_it_comes_late(tmp_path, images):
    by_hand = tmp_path / "a b.png.txt"
    assert save(images, lambda: by_hand.write_text("by hand\n"), save_captions=True) == ["a b.png"]
    assert by_hand.read_text() == "by hand\n" and not (tmp_path / "a b.txt").exists()


def test_what_came_while_the_run_was_at_work_goes_into_the_one_file_too(tmp_path, images):
    output = tmp_path / "captions.jsonl"
    by_hand = tmp_path / "a b.txt"
    save(images, lambda: by_hand.write_text("by hand\n"), save_captions=True, output=output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["by hand", "of ü😀.jpg", "of c.d.webp"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_row_that_came_while_the_run_was_at_work_goes_beside_the_image_too(tmp_path, images, overwrite):
    output = tmp_path / "captions.jsonl"
    row = json.dumps({"file_name": "a b.png", "text": "by hand"}) + "\n"
    options = {"save_captions": True, "output": output, "overwrite": overwrite}
    assert save(images, lambda: output.write_text(row), **options) == ["a b.png"]
    assert (tmp_path / "a b.txt").read_text() == "by hand\n"
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [
        *("by hand", "of ü😀.jpg", "of c.d.webp")
    ]


def test_a_caption_file_that_is_still_empty_leaves_its_row_to_the_next_run(tmp_path, images):
    output, by_hand = tmp_path / "captions.jsonl", tmp_path / "a b.txt"
    assert save(images, by_hand.touch, save_captions=True, output=output) == ["a b.png"]
    assert "a b.png" not in output.read_text()
    by_hand.write_text("by hand\n")
    save(images, save_captions=True, output=output)
    assert '"a b.png", "text": "by hand"' in output.read_text()


def test_a_file_saved_by_halves_or_with_half_characters_does_not_end_the_run(tmp_path, images):
    output = tmp_path / "captions.jsonl"
    odd = '{"file_name": "a b.png", "text": "\\ud83d"}\n'
    kept = save(images, lambda: output.write_text(odd), save_captions=True, output=output)
    assert odd in output.read_text() and kept == [str(images[0])]
    outputs = open_outputs(CaptionOptions(images=["."], output=output, overwrite=True), FakeFamily())
    outputs.open(images)
    outputs.find_lacking(images)
    outputs.begin(images)
    output.write_text('{"file_name": "a b')
    assert outputs.write(Caption(images[0], "ours"))
    output.write_text('{"file_name": "a b.png", "text": "by hand"}\n')
    assert outputs.finish(images) == [str(images[0])]
    outputs.close()


@pytest.mark.parametrize("saved", ["in place", "by a rename", "anew"])
def test_even_overwrite_keeps_a_caption_that_was_written_after_it_began(tmp_path, images, saved):
    by_hand = tmp_path / "a b.txt"
    if saved != "anew":
        by_hand.write_text("old")

    def write():
        (tmp_path / "new").write_text("by hand\n")
        (tmp_path / "new").replace(by_hand) if saved == "by a rename" else by_hand.write_text("by hand\n")

    assert save(images, write, save_captions=True, overwrite=True) == ["a b.png"]
    assert by_hand.read_text() == "by hand\n"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_to_nothing_is_refused_and_nothing_is_made_behind_it(tmp_path, images, overwrite):
    folder = tmp_path / "in"
    folder.mkdir()
    image = images[0].rename(folder / images[0].name)
    (folder / "a b.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UsageError, match=r"a b\.txt is a link to nothing: delete it"):
        save([image], save_captions=True, overwrite=overwrite)
    assert not (tmp_path / "outside.txt").exists()


def test_a_folder_named_like_a_caption_is_refused_before_it_would_be_replaced(tmp_path, images):
    (tmp_path / "a b.txt").mkdir()
    with pytest.raises(UsageError, match=r"a b\.txt is no file"):
        save(images, save_captions=True, overwrite=True)


def test_what_killed_writes_left_is_cleared_from_the_folders_and_nothing_else(tmp_path, images):
    litter = tmp_path / ".a b.txt.0123abcd.caption-train.tmp"
    for path in (litter, tmp_path / ".a.tmp", tmp_path / "b.tmp"):
        path.touch()
    save(images, save_captions=True)
    assert sorted(p.name for p in tmp_path.glob("*tmp")) == [".a.tmp", "b.tmp"]
    assert not list(tmp_path.glob(".caption*"))


def test_a_folder_that_another_run_captions_is_refused_until_that_ends(tmp_path, images):
    (tmp_path / "link").symlink_to(tmp_path)
    other = open_outputs(CaptionOptions(images=["."], save_captions=True), FakeFamily())
    other.open([*images, tmp_path / "link" / "a b.png"])
    other.find_lacking([*images, tmp_path / "link" / "a b.png"])
    with pytest.raises(
        CaptionTrainError, match=r"--save_captions: .*: another run, process \d+ on .*wait until"
    ):
        save(images, save_captions=True)
    other.close()
    assert save(images, save_captions=True) == []


def test_a_thousand_folders_are_locked_and_let_go(tmp_path):
    images = []
    for number in range(1100):
        (tmp_path / str(number)).mkdir()
        images.append(tmp_path / str(number) / "a.png")
        images[-1].touch()
    save(images, save_captions=True)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"a.png", "a.txt"}


def test_a_caption_no_file_can_hold_is_one_line(tmp_path, images):
    output = tmp_path / "captions.jsonl"
    output.write_text('{"file_name": "a b.png", "text": "\\ud83d"}\n')
    with pytest.raises(CaptionTrainError, match=r"a b\.txt: the caption has half characters"):
        save(images, save_captions=True, output=output)
    save(images, output=output)
    assert '"\\ud83d"' in output.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_captions": True, "caption_extension": ".PNG"}, "would write over images"),
        ({"output": "nowhere/captions.jsonl"}, "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(images, options, message):
    if "output" in options:
        options = {"output": images[0].parent / options["output"]}
    with pytest.raises(UsageError, match=message.replace("nowhere", r".*nowhere")):
        save(images, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "zwx, a cat"),
        ("zwx, a cat", "zwx, a cat"),
        ("a zwx cat", "a zwx cat"),
        ("zwxy", "zwx, zwxy"),
        ("", "zwx"),
    ],
)
def test_the_trigger_stands_in_every_caption_once(text, expected):
    assert wrap_caption(text, trigger="zwx") == expected


def test_prefix_and_suffix_are_taken_as_given():
    assert wrap_caption("cat", prefix="a photo of a ", suffix=".") == "a photo of a cat."

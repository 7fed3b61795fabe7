"""Files beside the images: which name, what is kept, what is copied from the other output."""

import json
import subprocess
import sys

import pytest

from caption_train.captioning.outputs import Outputs, wrap_caption
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError, UsageError
from tests.fixtures.paths import REPOSITORY


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / name for name in ("a b.png", "ü😀.jpg", "c.d.webp")]
    for path in paths:
        path.touch()
    return paths


def save(images, **options):
    outputs = Outputs(CaptionOptions(images=["."], **options))
    for image in outputs.find_pending(images):
        outputs.write(image, f"of {image.name}")
    outputs.finish(images)
    outputs.close()


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
        from caption_train.captioning.caption_file import CaptionFile
        file = CaptionFile(Path({str(output)!r}))
        file.lock()
        file.append(Path({str(images[0])!r}), "theirs")
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

"""What `--images` finds."""

from pathlib import Path

import pytest

from caption_train.captioning.inputs import find_inputs
from caption_train.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    for name in ("img10.png", "img2.JPG", "notes.txt", ".hidden.png", "sub/deep/c.webp", "[x] 1/d.gif"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(folder, *patterns, **options):
    found = find_inputs([str(folder / pattern) for pattern in patterns], **options)
    return [path.relative_to(folder).as_posix() for path in found.images]


def test_a_folder_gives_its_images_in_natural_order(folder):
    assert names(folder, ".") == ["img2.JPG", "img10.png"]


def test_recursive_gives_the_folders_inside_too(folder):
    assert names(folder, ".", recursive=True) == ["[x] 1/d.gif", "img2.JPG", "img10.png", "sub/deep/c.webp"]


def test_a_glob_gives_images_only(folder):
    assert names(folder, "*") == ["img2.JPG", "img10.png"]
    assert names(folder, "**/*.webp") == ["sub/deep/c.webp"]


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(folder):
    assert names(folder, "[x] 1") == ["[x] 1/d.gif"]


def test_an_image_named_twice_is_captioned_once(folder):
    assert names(folder, "img2.JPG", ".", "img2.JPG") == ["img2.JPG", "img10.png"]


def test_a_list_keeps_its_order_and_names_what_is_missing(folder):
    (folder / "list.txt").write_bytes("\ufeffsub/deep/c.webp\r\n\r\nno such.png\r\nimg2.JPG".encode())
    inputs = find_inputs([str(folder / "list.txt")])
    assert [path.name for path in inputs.images] == ["c.webp", "img2.JPG"]
    assert inputs.missing == [f"no such.png: there is no such file ({folder}/list.txt:3)"]


def test_list_names_are_relative_to_the_current_folder_first(folder, monkeypatch):
    monkeypatch.chdir(folder / "sub")
    (folder / "list.txt").write_text("deep/c.webp\nimg2.JPG\n")
    assert [path.as_posix() for path in find_inputs([str(folder / "list.txt")]).images] == [
        "deep/c.webp",
        f"{folder}/img2.JPG",
    ]


def test_links_to_images_elsewhere_are_captioned(folder, tmp_path_factory):
    links = tmp_path_factory.mktemp("links")
    (links / "a.jpg").symlink_to(folder / "img2.JPG")
    (links / "loop").symlink_to(links)
    assert names(links, ".", recursive=True) == ["a.jpg"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gone", "no such file or folder"),
        ("*.bmp", "no images there"),
        ("sub", "--recursive"),
        ("empty.txt", "the list is empty"),
        ("binary.txt", "cannot be read as a list"),
    ],
)
def test_what_names_no_image_is_refused(folder, pattern, message):
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=message):
        find_inputs([str(folder / pattern)])


def test_what_a_shell_adds_to_images_is_no_list(folder):
    for name in ("img10.txt", "img2.JPG.txt", "list.txt", "metadata.jsonl"):
        (folder / name).write_text("sub/deep/c.webp\n")
    every = ("img10.png", "img10.txt", "img2.JPG", "img2.JPG.txt", "metadata.jsonl")
    assert names(folder, *every) == ["img10.png", "img2.JPG"]
    assert names(folder, *every, "list.txt") == ["img10.png", "img2.JPG", "sub/deep/c.webp"]
    assert names(folder, "img2.JPG", "img10.txt") == ["img2.JPG"]
    assert names(folder, "img10.txt") == ["sub/deep/c.webp"]


def test_a_name_with_a_tilde_is_a_file_where_there_is_no_such_user(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "~tmp.png").touch()
    (folder / "list.txt").write_text("~tmp.png\n")
    assert [path.name for path in find_inputs(["~tmp.png"]).images] == ["~tmp.png"]
    assert [path.name for path in find_inputs(["list.txt"]).images] == ["~tmp.png"]


def test_a_line_too_long_for_a_name_is_named_shortened(folder):
    (folder / "list.txt").write_text("img2.JPG\n" + "word " * 1000)
    inputs = find_inputs([str(folder / "list.txt")])
    assert len(inputs.images) == 1
    assert inputs.missing[0].startswith("word word") and len(inputs.missing[0]) < 400
    with pytest.raises(UsageError, match="no such file"):
        find_inputs(["x" * 5000])


def test_a_link_to_nothing_is_named(folder):
    (folder / "b.png").symlink_to("/nowhere/b.png")
    (folder / "b.txt").symlink_to("/nowhere/b.txt")
    inputs = find_inputs([str(folder)])
    assert inputs.missing == [f"{folder}/b.png: a link to nothing"]
    assert len(inputs.images) == 2


def test_images_of_formats_that_are_not_read_are_named(tmp_path):
    (tmp_path / "a.jxl").touch()
    with pytest.raises(UsageError, match=r"no images there.*; 1 \.jxl file is not read: convert it"):
        find_inputs([str(tmp_path)])
    (tmp_path / "b.png").touch()
    for pattern in (tmp_path, tmp_path / "*"):
        assert [Path(name).name for name in find_inputs([str(pattern)]).unread] == ["a.jxl"]

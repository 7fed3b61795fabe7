import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caption_train.data.formats import IMAGE_SUFFIXES, natural_key
from caption_train.data.scan import scan_folder
from caption_train.data.text import read_caption
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable


def find_images(root, **options):
    folder = scan_folder(root, (), **options)
    return [folder.root / name for name in folder.images]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names_of(folder, images):
    return [image.relative_to(folder).as_posix() for image in images]


def test_images_of_every_suffix_in_any_case_are_found_at_any_depth(tmp_path):
    names = {f"a/b/{i}{s.upper() if i % 2 else s}" for i, s in enumerate(sorted(IMAGE_SUFFIXES))}
    touch(tmp_path, *names, "a/notes.txt", "a/png")
    assert set(names_of(tmp_path, find_images(tmp_path))) == names


def test_images_come_in_natural_order_folder_by_folder(tmp_path):
    ordered = ["a/img2.png", "a/img10.png", "a/img10b.png", "a b/img1.png", "img1.png", "img02.png"]
    touch(tmp_path, *ordered)
    assert names_of(tmp_path, find_images(tmp_path)) == ordered


def test_without_recursion_only_the_folder_itself_is_searched(tmp_path):
    touch(tmp_path, "a.png", "b/c.png")
    assert names_of(tmp_path, find_images(tmp_path, recursive=False)) == ["a.png"]


def test_hidden_files_and_folders_are_skipped_and_named(tmp_path):
    touch(tmp_path, "a.png", ".b.png", "._a.png", ".git/c.png")
    folder = scan_folder(tmp_path)
    assert folder.images == ["a.png"]
    assert sorted(folder.hidden) == ["._a.png", ".b.png", ".git"]


def test_a_loop_of_links_ends_and_adds_nothing(tmp_path):
    touch(tmp_path, "a/x.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    for follow in (False, True):
        assert names_of(tmp_path, find_images(tmp_path, follow_symlinks=follow)) == ["a/x.png"]


def test_links_out_of_the_folder_are_followed_only_on_request(tmp_path):
    touch(tmp_path, "elsewhere/x.png", "y.png", "data/z.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/y.png").symlink_to(tmp_path / "y.png")
    (tmp_path / "data/z2.png").symlink_to("z.png")
    folder = scan_folder(tmp_path / "data")
    assert folder.images == ["z.png", "z2.png"]
    assert folder.links == ["linked", "y.png"]
    followed = scan_folder(tmp_path / "data", follow_symlinks=True)
    assert followed.images == ["linked/x.png", "y.png", "z.png", "z2.png"]


def test_a_named_pipe_is_no_image_and_blocks_nothing(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    folder = scan_folder(tmp_path)
    assert folder.images == [] and folder.captions == {}
    assert folder.unusable == ["a.png: not a regular file", "a.txt: not a regular file"]
    with pytest.raises(CaptionTrainError, match=r"a\.txt: not a regular file"):
        read_caption(tmp_path / "a.txt")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat\r\non a mat\r\n", "a cat on a mat"),
        (b"tag one,\n\n  tag two,\rtag three", "tag one, tag two, tag three"),
        ("一只猫 🐈\u2028é".encode(), "一只猫 🐈 é"),
        (b" \r\n\t\n", ""),
        (b"", ""),
    ],
)
def test_a_caption_becomes_one_line(tmp_path, content, caption):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert read_caption(path) == caption


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"caf\xe9", r"not UTF-8 text \(position 3\); compile_captions\.py --encoding cp1252"),
        ("a cat".encode("utf-16"), "--encoding utf-16"),
        (b"a\0cat", "NUL"),
        (b"a" * 10_000_000, r"10\.0 MB, longer than any caption"),
    ],
)
def test_a_caption_that_cannot_be_read_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(CaptionTrainError, match=rf"a\.txt: .*{reason}"):
        read_caption(path)


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1252", "café"), ("utf-16", "ein Café"), ("shift_jis", "猫")]
)
def test_other_encodings_are_read_on_request(tmp_path, encoding, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert read_caption(path, encoding) == text


@given(st.text(), st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-8-sig"]))
def test_any_text_is_one_line_or_one_error(tmp_path_factory, text, encoding):
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    try:
        caption = read_caption(path, encoding)
    except CaptionTrainError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert caption.splitlines() in ([caption], [])
        assert caption.split() == text.removeprefix("\ufeff").split() or "\ufeff" in text


@given(st.binary(max_size=200))
def test_any_bytes_are_one_line_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes(content)
    try:
        assert len(read_caption(path).splitlines()) <= 1
    except CaptionTrainError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


@given(st.lists(st.text(st.sampled_from("ab/0129 _٣²"), max_size=8)))
def test_natural_order_is_an_order(names):
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


@given(st.text())
def test_printable_text_is_one_line_of_utf_8(text):
    shown = escape_unprintable(text)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")


def test_images_of_formats_that_are_not_read_are_listed(tmp_path):
    for name in ("a.png", "b.JXL", "c.svg", "d.jp2", "e.doc"):
        (tmp_path / name).touch()
    folder = scan_folder(tmp_path)
    assert folder.images == ["a.png"] and folder.unread == ["b.JXL", "c.svg", "d.jp2"]

import pytest

from caption_train.data.formats import CAPTION_SUFFIXES
from caption_train.data.pairs import match_captions
from caption_train.data.scan import scan_folder


@pytest.fixture
def match(tmp_path):
    def match(files, extensions=CAPTION_SUFFIXES, **settings):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return match_captions(scan_folder(tmp_path, extensions), extensions, **settings)

    return match


def captions_of(matches):
    return {name: pair.caption for name, pair in matches.pairs.items()}


def test_a_caption_stands_beside_its_image_in_the_same_folder(match):
    matches = match({"a/x.png": "", "a/x.txt": "in a", "b/x.png": "", "b/x.txt": "in b", "x.png": ""})
    assert captions_of(matches) == {"a/x.png": "in a", "b/x.png": "in b"}
    assert matches.without_caption == ["x.png"]
    assert matches.pairs["a/x.png"].source == "a/x.txt"


def test_extensions_match_in_any_case(match):
    assert captions_of(match({"IMG.JPG": "", "IMG.TXT": "a cat"})) == {"IMG.JPG": "a cat"}


def test_two_images_of_one_stem_share_its_caption_and_are_named(match):
    matches = match({"a.png": "", "a.jpg": "", "a.txt": "both"})
    assert captions_of(matches) == {"a.jpg": "both", "a.png": "both"}
    assert matches.shared == ["a.txt: a.jpg, a.png"]


def test_the_full_image_name_goes_before_the_stem(match):
    matches = match({"a.png": "", "a.jpg": "", "a.png.txt": "the png's", "a.txt": "the other's"})
    assert captions_of(matches) == {"a.jpg": "the other's", "a.png": "the png's"}
    assert matches.shared == [] and matches.second == []


def test_the_first_extension_goes_before_the_second(match):
    files = {"a.png": "", "a.txt": "from txt", "a.caption": "from caption", "b.png": "", "b.caption": "b"}
    assert captions_of(match(files)) == {"a.png": "from txt", "b.png": "b"}
    matches = match(files, ["caption", ".txt"])
    assert captions_of(matches) == {"a.png": "from caption", "b.png": "b"}
    assert matches.second == ["a.txt"]


def test_an_extension_may_have_several_dots(match):
    files = {"a.png": "", "a.wd14.txt": "tags", "a.txt": "sentence"}
    assert captions_of(match(files, [".wd14.txt"])) == {"a.png": "tags"}
    assert match(files, [".txt"]).without_image == ["a.wd14.txt"]


def test_what_makes_no_pair_is_named(match):
    matches = match(
        {"a.png": "", "b.png": "", "b.txt": " \n", "c.txt": "alone", "d.png": "", "d.txt": b"\xff\xfa"}
    )
    assert matches.pairs == {}
    assert matches.without_caption == ["a.png"]
    assert matches.empty == ["b.txt"]
    assert matches.without_image == ["c.txt"]
    assert len(matches.unreadable) == 1 and matches.unreadable[0].startswith("d.txt: not UTF-8")


def test_a_caption_read_elsewhere_goes_before_a_file(match):
    matches = match({"a.png": "", "a.txt": "old"}, given={"a.png": ("new", "meta.json: a")})
    assert captions_of(matches) == {"a.png": "new"}
    assert matches.second == ["a.txt"]

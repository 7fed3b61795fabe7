import json

import pytest

from caption_train.data.kohya import count_repeats, find_metadata, read_metadata
from caption_train.data.scan import scan_folder
from caption_train.errors import CaptionTrainError, UsageError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "10_dog/b.png", "10_dog/c.jpg", "5_cat/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return scan_folder(tmp_path)


def write_json(folder, content, name="meta_cap.json"):
    path = folder.root / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "repeats"),
    [
        ("a.png", 1),
        ("10_dog/a.png", 10),
        ("3_set/20_dog/a.png", 20),
        ("10_dog/best/a.png", 10),
        ("0_off/a.png", 0),
        ("10/a.png", 1),
        ("dog_10/a.png", 1),
        ("²_dog/a.png", 1),
        ("-3_dog/a.png", 1),
    ],
)
def test_the_innermost_numbered_folder_tells_the_repeats(name, repeats):
    assert count_repeats(name) == repeats


@pytest.mark.parametrize(
    ("entry", "caption"),
    [
        ({"caption": "a dog", "tags": "dog, grass"}, "a dog, dog, grass"),
        ({"tags": "dog, grass"}, "dog, grass"),
        ({"caption": "a dog"}, "a dog"),
        ({"caption": "a dog", "tags": ""}, "a dog"),
        ({"caption": "", "tags": "dog"}, "dog"),
        ({"caption": "a dog\r\nin grass", "tags": None}, "a dog in grass"),
        ({"train_resolution": [1, 2]}, ""),
    ],
)
def test_caption_and_tags_are_joined_as_kohya_joins_them(folder, entry, caption):
    path = write_json(folder, {"a.png": entry, "10_dog/b": {"caption": "x"}})
    assert read_metadata(path, folder)[0]["a.png"] == (caption, "meta_cap.json: a.png")


@pytest.mark.parametrize(
    ("key", "images"),
    [
        ("a", ["a.png"]),
        ("a.png", ["a.png"]),
        ("10_dog/b", ["10_dog/b.png"]),
        ("b", ["10_dog/b.png"]),
        ("/home/me/train/10_dog/b.png", ["10_dog/b.png"]),
        ("C:\\train\\10_dog\\c.jpg", ["10_dog/c.jpg"]),
        ("c.png", ["5_cat/c.png"]),
    ],
)
def test_an_image_is_found_by_path_stem_or_a_path_from_another_machine(folder, key, images):
    given, problems = read_metadata(write_json(folder, {key: {"caption": "x"}}), folder)
    assert list(given) == images and problems == []


def test_entries_that_fit_no_image_or_several_are_named(folder):
    path = write_json(
        folder,
        {"c": {"caption": "x"}, "gone": {"caption": "x"}, "a": {"tags": ["x"]}, "b": {"caption": "\ud800"}},
    )
    given, problems = read_metadata(path, folder)
    assert given == {}
    assert problems == [
        "meta_cap.json: c: could be any of 5_cat/c.png, 10_dog/c.jpg",
        "meta_cap.json: gone: no such image",
        "meta_cap.json: a: caption or tags is not a string",
        "meta_cap.json: b: half characters (lone surrogates)",
    ]


def test_metadata_is_found_among_other_json(folder):
    write_json(folder, {"size": 3}, "settings.json")
    write_json(folder, {"caption": "of one image"}, "a.json")
    write_json(folder, "{broken", "broken.json")
    assert find_metadata(folder) is None
    path = write_json(folder, {"a": {"caption": "x"}})
    assert find_metadata(folder) == path


def test_several_metadata_files_have_to_be_chosen_from(folder):
    for name in ("meta_cap.json", "meta_clean.json"):
        write_json(folder, {"a": {"caption": "x"}}, name)
    with pytest.raises(UsageError, match=r"meta_cap\.json, meta_clean\.json.*--kohya_metadata"):
        find_metadata(folder)


@pytest.mark.parametrize("content", ["{broken", "[]", "{}", '{"a": 1}', "[" * 100_000, "\ud800"])
def test_what_is_no_kohya_metadata_is_one_line(folder, content):
    path = folder.root / "meta.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CaptionTrainError, match=r"meta\.json: ") as caught:
        read_metadata(path, folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_metadata_file_is_one_line(folder):
    with pytest.raises(CaptionTrainError, match=r"none\.json: No such file"):
        read_metadata(folder.root / "none.json", folder)

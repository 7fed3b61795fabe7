import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_train.data import image_index
from caption_train.data.dataset import read_dataset
from caption_train.data.images import inspect_image
from caption_train.errors import CaptionTrainError, UsageError
from tests.fixtures.sample_set import compile_folder, counted, make_folder, rows_of, write_image, write_pair


@pytest.fixture
def dataset(tmp_path):
    return make_folder(tmp_path / "my data")


def test_rows_are_what_imagefolder_reads_in_natural_order(dataset):
    assert compile_folder(dataset) == 0
    assert rows_of(dataset) == [
        {"file_name": "a.png", "text": "caption of a.png"},
        {"file_name": "b/c.jpg", "text": "caption of b/c.jpg"},
        {"file_name": "b/train test val.png", "text": "caption of b/train test val.png"},
        {"file_name": "😀 é.webp", "text": "caption of 😀 é.webp"},
    ]


def test_compiled_and_bare_pairs_are_the_same_dataset(dataset):
    bare = {(pair.image, pair.caption) for pair in read_dataset(dataset)}
    compile_folder(dataset)
    assert {(pair.image, pair.caption) for pair in read_dataset(dataset)} == bare


def test_a_caption_that_cannot_be_read_fails_after_the_rest_is_written(dataset, capsys):
    (dataset / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CaptionTrainError, match="1 files could not be used"):
        compile_folder(dataset)
    assert len(rows_of(dataset)) == 3
    assert counted(capsys, "captions that cannot be read")[1][0].startswith("a.txt: not UTF-8")
    assert compile_folder(dataset, encoding="cp1252", overwrite=True) == 0
    assert rows_of(dataset)[0]["text"] == "café"


def test_check_images_leaves_out_what_cannot_be_decoded(dataset, capsys):
    content = (dataset / "b/c.jpg").read_bytes()
    (dataset / "b/c.jpg").write_bytes(content[: len(content) // 2])
    assert compile_folder(dataset) == 0
    with pytest.raises(CaptionTrainError, match="1 files"):
        compile_folder(dataset, check_images=True)
    assert counted(capsys, "images that cannot be decoded")[1][0].startswith("b/c.jpg: ")
    assert len(rows_of(dataset)) == 3


def test_what_check_images_has_decoded_training_does_not_decode_again(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_index, "_RACY_NS", -(10**15))
    assert compile_folder(dataset, check_images=True) == 0
    images = [pair.image for pair in read_dataset(dataset)]
    monkeypatch.setattr(image_index, "inspect_image", lambda path: pytest.fail(f"{path} is decoded"))
    assert image_index.inspect_images(images) == [inspect_image(image) for image in images]


def test_a_dry_run_writes_nothing(dataset, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    assert compile_folder(dataset, tmp_path / "out", dry_run=True) == 0
    assert set(tmp_path.rglob("*")) == before
    assert "Nothing written (--dry_run)" in capsys.readouterr().out


def test_captions_edited_by_hand_are_not_lost(dataset):
    compile_folder(dataset)
    path = dataset / "metadata.jsonl"
    edited = path.read_text().replace("caption of a.png", "better")
    path.write_text(edited)
    with pytest.raises(
        CaptionTrainError, match=r"--overwrite would replace\n  metadata\.jsonl:1: a\.png: better"
    ):
        compile_folder(dataset)
    assert path.read_text() == edited
    compile_folder(dataset, overwrite=True)
    assert rows_of(dataset)[0]["text"] == "caption of a.png"


@pytest.mark.parametrize(
    "line",
    ['{"file_name": "a.png", "text": "caption of a.png", "mood": "calm"}', "{broken", '{"text": "x"'],
)
def test_columns_and_lines_of_others_are_not_lost(dataset, line):
    (dataset / "metadata.jsonl").write_text(line)
    with pytest.raises(CaptionTrainError, match=r"metadata\.jsonl:1: "):
        compile_folder(dataset)
    assert (dataset / "metadata.jsonl").read_text() == line


def test_compiling_again_needs_no_overwrite_when_nothing_is_lost(dataset):
    compile_folder(dataset)
    write_pair(dataset / "new.png", "one more")
    (dataset / "a.png").unlink()
    assert compile_folder(dataset, validation_split=0.5) == 0
    assert "one more" in {row["text"] for row in rows_of(dataset)}
    assert compile_folder(dataset) == 0


def test_an_output_folder_elsewhere_gets_the_images(dataset, tmp_path):
    out = tmp_path / "out/deep"
    compile_folder(dataset, out)
    assert len(read_dataset(out)) == 4
    assert not (dataset / "metadata.jsonl").exists()
    (out / "a.png").unlink()
    write_image(out / "a.png", "blue", (9, 9))
    with pytest.raises(CaptionTrainError, match=r"a\.png: another image is there"):
        compile_folder(dataset, out)
    assert compile_folder(dataset, out, overwrite=True, place_images="copy") == 0
    assert (out / "a.png").read_bytes() == (dataset / "a.png").read_bytes()


def test_an_output_folder_inside_the_dataset_is_refused(dataset):
    with pytest.raises(UsageError, match="lies inside dataset_dir"):
        compile_folder(dataset, dataset / "out")


def test_the_split_is_a_column_and_keeps_copies_together(dataset):
    for number in range(20):
        write_pair(dataset / f"{number}.png", f"n{number}")
        (dataset / f"copy of {number}.png").write_bytes((dataset / f"{number}.png").read_bytes())
        (dataset / f"copy of {number}.txt").write_text("copy")
    compile_folder(dataset, validation_split=0.25)
    split = {row["file_name"]: row["split"] for row in rows_of(dataset)}
    assert list(split.values()).count("validation") == 11
    assert all(split[f"{n}.png"] == split[f"copy of {n}.png"] for n in range(20))
    assert {pair.split for pair in read_dataset(dataset)} == {"train"}
    assert len(read_dataset(dataset, split="validation")) == 11


def test_a_split_of_one_image_is_refused(tmp_path):
    write_pair(tmp_path / "a.png", "x")
    with pytest.raises(UsageError, match="--validation_split needs two different images"):
        compile_folder(tmp_path, validation_split=0.5)


def test_kohya_repeats_are_written_on_request(tmp_path, capsys):
    for name in ("3_dog/a.png", "0_off/x.png", "b.png"):
        write_pair(tmp_path / name, name)
    compile_folder(tmp_path)
    assert counted(capsys, "Kohya repeat folders") == (2, ["0_off: 0", "3_dog: 3"])
    assert len(rows_of(tmp_path)) == 3
    compile_folder(tmp_path, kohya_repeats=True)
    assert counted(capsys, "images in 0_ folders")[1] == ["0_off/x.png"]
    assert [row["file_name"] for row in rows_of(tmp_path)] == ["3_dog/a.png"] * 3 + ["b.png"]


def test_validation_rows_are_not_repeated(tmp_path):
    for number in range(10):
        write_pair(tmp_path / f"3_dog/{number}.png", f"{number}")
    compile_folder(tmp_path, kohya_repeats=True, validation_split=0.2)
    splits = [row["split"] for row in rows_of(tmp_path)]
    assert splits.count("validation") == 2 and splits.count("train") == 24


def test_absurd_repeats_are_refused(tmp_path):
    write_pair(tmp_path / "99999999_dog/a.png", "x")
    with pytest.raises(UsageError, match="99,999,999 repeats"):
        compile_folder(tmp_path, kohya_repeats=True)
    assert compile_folder(tmp_path) == 0


def test_kohya_metadata_goes_before_caption_files(dataset, capsys):
    entries = {"a": {"caption": "a dog", "tags": "dog, grass"}, "gone": {"tags": "x"}}
    (dataset / "meta_cap.json").write_text(json.dumps(entries))
    compile_folder(dataset)
    assert rows_of(dataset)[0] == {"file_name": "a.png", "text": "a dog, dog, grass"}
    assert counted(capsys, "captions from Kohya metadata")[0] == 1
    other = dataset.parent / "other.json"
    other.write_text(json.dumps({"a": {"caption": "another"}}))
    compile_folder(dataset, kohya_metadata=other, overwrite=True)
    assert rows_of(dataset)[0]["text"] == "another"
    assert counted(capsys, "captions not used")[1] == ["a.txt"]


def test_names_imagefolder_cannot_read_are_named_and_left_out(dataset, capsys):
    write_pair(dataset / "back\\slash.png", "x")
    write_pair(dataset / os.fsdecode(b"caf\xe9.png"), "x")
    with pytest.raises(CaptionTrainError, match="2 files could not be used"):
        compile_folder(dataset)
    listed = counted(capsys, "names imagefolder cannot read")[1]
    assert listed == ["back\\slash.png", "caf\\udce9.png"]
    assert len(rows_of(dataset)) == 4


def test_what_cannot_be_written_is_one_line(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CaptionTrainError, match=r"(?s)^[^\n]*file[^\n]*$"):
        compile_folder(dataset, tmp_path / "file/out")
    (dataset / "metadata.jsonl").mkdir()
    with pytest.raises(CaptionTrainError, match=r"^[^\n]*metadata\.jsonl[^\n]*$"):
        compile_folder(dataset, overwrite=True)


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0\\", exclude_categories=["Cs"]),
    min_size=1,
    max_size=20,
).filter(lambda name: not name.startswith("."))
captions = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff")).filter(
    str.strip
)


@settings(max_examples=60)
@given(st.dictionaries(names, captions, min_size=1, max_size=4))
def test_any_name_and_caption_survive(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("any")
    for name, caption in pairs.items():
        (folder / f"{name}.png").write_bytes(b"x")
        (folder / f"{name}.txt").write_bytes(caption.encode())
    compile_folder(folder)
    read = {pair.image.name.removesuffix(".png"): pair.caption.split() for pair in read_dataset(folder)}
    assert read == {name: caption.split() for name, caption in pairs.items()}

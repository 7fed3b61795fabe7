import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_train.data.dataset import inspect_dataset, read_dataset
from caption_train.data.pairs import Pair
from caption_train.data.rows import write_metadata
from caption_train.data.split import fingerprint, split_by_content
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.files import hash_file
from tests.fixtures.sample_set import write_image, write_pair


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    for name in ("a.png", "b/c.png", "b/d e 😀.png"):
        write_image(folder / name)
    return folder


def write_lines(folder, *lines):
    folder.mkdir(exist_ok=True)
    content = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (folder / "metadata.jsonl").write_bytes(b"".join(line + b"\n" for line in content))


def row(name="a.png", text="a caption", **columns):
    return {"file_name": name, "text": text, **columns}


def hash_all(pairs):
    return fingerprint(pairs, {pair.image: hash_file(pair.image) for pair in pairs})


def problem_of(folder, line, **settings):
    write_lines(folder, row(), line)
    pairs, problems = inspect_dataset(folder, **settings)
    assert len(pairs) == 1 and len(problems) == 1
    return problems[0]


def test_rows_are_read_in_order_and_know_their_line(dataset):
    write_lines(dataset, row("b/d e 😀.png", "一只猫 🐈"), b"", row("a.png", " x\n"), row("a.png", "again"))
    pairs = read_dataset(dataset)
    assert pairs == [
        Pair(dataset / "b/d e 😀.png", "一只猫 🐈", "metadata.jsonl:1"),
        Pair(dataset / "a.png", "x", "metadata.jsonl:3"),
        Pair(dataset / "a.png", "again", "metadata.jsonl:4"),
    ]


def test_a_caption_column_stands_for_text(dataset):
    write_lines(dataset, {"file_name": "a.png", "caption": "x", "text": None, "extra": [1]})
    assert read_dataset(dataset)[0].caption == "x"


def test_a_byte_order_mark_crlf_and_backslashes_are_read(dataset):
    lines = b'\xef\xbb\xbf{"file_name": "b\\\\c.png", "text": "x"}\r\n'
    (dataset / "metadata.jsonl").write_bytes(lines)
    assert read_dataset(dataset)[0].image == dataset / "b/c.png"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{broken", "broken JSON"),
        (b'{"file_name": "a.png", "text": "caf\xe9"}', "not UTF-8 text"),
        (b"[" * 100_000, "broken JSON"),
        (b"[]", "not a JSON object"),
        (b'{"file_name": "a.png", "text": "\\ud800"}', "half characters"),
        (row(text="a\0b"), "NUL characters"),
        (row(text="x" * 10_000_000), "text is 10,000,000 characters long"),
        (row(text=" \n"), "text is empty"),
        (row(text=["x"]), "text is not a string"),
        ({"file_name": "a.png"}, "no text or caption column"),
        (row(name=None), "no file_name"),
        (row(name="a\0.png"), "file_name is no file's name"),
        (row(name=7), "file_name is no file's name"),
        (row(name="x" * 5000), "File name too long"),
        (row(name="\ud800.png"), "is no file name"),
        (row(name="gone.png"), "gone.png is missing"),
        (row(name="b"), "b is not a regular file"),
        (row(name="empty.png"), r"empty.png is empty \(0 bytes\)"),
        (row(name="../secret.png"), "points outside the dataset folder"),
        (row(name="b/../../secret.png"), "points outside the dataset folder"),
        (row(name="..\\secret.png"), "points outside the dataset folder"),
        (row(name="/etc/passwd"), "points outside the dataset folder"),
        (row(name="C:\\secret.png"), "points outside the dataset folder"),
        (row(split="holdout"), "split is 'holdout', not one of train, validation, test"),
        (row(prompt=["<OD>"]), "prompt is not a string"),
    ],
)
def test_a_bad_row_is_named_by_line_and_reason(dataset, line, problem):
    write_image(dataset.parent / "secret.png")
    (dataset / "empty.png").touch()
    message = problem_of(dataset, line)
    assert message.startswith("metadata.jsonl:2: ")
    with pytest.raises(CaptionTrainError, match=problem):
        read_dataset(dataset)


def test_links_out_of_the_dataset_are_refused_unless_asked_for(dataset):
    secret = write_image(dataset.parent / "secret/s.png")
    (dataset / "link.png").symlink_to(secret)
    (dataset / "folder").symlink_to(secret.parent)
    (dataset / "inside.png").symlink_to("a.png")
    for name in ("link.png", "folder/s.png"):
        assert "is a link that leads outside" in problem_of(dataset, row(name))
    write_lines(dataset, row("link.png"), row("folder/s.png"))
    assert len(read_dataset(dataset, follow_symlinks=True)) == 2
    write_lines(dataset, row("inside.png"))
    assert len(read_dataset(dataset)) == 1


def test_all_problems_come_in_one_error(dataset):
    write_lines(dataset, row(), *(row(f"gone{i}.png") for i in range(30)))
    with pytest.raises(CaptionTrainError) as caught:
        read_dataset(dataset)
    lines = str(caught.value).splitlines()
    assert "30 bad rows or files" in lines[0]
    assert lines[1] == "  metadata.jsonl:2: gone0.png is missing"
    assert lines[-1] == "  … and 10 more"


def test_a_split_column_keeps_rows_out_of_training(dataset):
    write_lines(dataset, row(split="train"), row("b/c.png", split="val"), row(text="y", split=None))
    assert [pair.caption for pair in read_dataset(dataset)] == ["a caption", "y"]
    assert [pair.image.name for pair in read_dataset(dataset, split="validation")] == ["c.png"]
    assert len(read_dataset(dataset, split=None)) == 3
    with pytest.raises(UsageError, match="3 pairs, none of them in the split 'test'"):
        read_dataset(dataset, split="test")


def test_a_row_may_ask_for_its_caption(dataset):
    plain, asked = row("b/c.png", prompt=None), row(prompt="<REGION_TO_OCR><loc_1><loc_2><loc_3><loc_4>")
    write_lines(dataset, plain, asked)
    pairs = read_dataset(dataset)
    assert [pair.prompt for pair in pairs] == [None, "<REGION_TO_OCR><loc_1><loc_2><loc_3><loc_4>"]
    assert "prompt" not in pairs[0].texts
    write_lines(dataset, plain, row())
    assert hash_all(read_dataset(dataset)) != hash_all(pairs)


def test_without_metadata_the_caption_files_are_read(tmp_path):
    write_pair(tmp_path / "a/x.png", "from a file")
    write_image(tmp_path / "uncaptioned.png")
    assert read_dataset(tmp_path) == [Pair(tmp_path / "a/x.png", "from a file", "a/x.txt")]
    with pytest.raises(UsageError, match=r"no metadata\.jsonl, 2 images, 0 \.caption files"):
        read_dataset(tmp_path, caption_extensions=[".caption"])


def test_links_left_alone_are_problems_where_they_could_lead_to_data(tmp_path):
    folder = tmp_path / "data"
    write_pair(folder / "a.png", "fine")
    write_pair(tmp_path / "elsewhere" / "b.png", "x")
    for name, target in {
        **{"b.png": "../elsewhere/b.png", "folder": "../elsewhere", "gone.txt": "nowhere"},
        **{"loop": ".", "notes.md": "../elsewhere/b.txt", "c.png": "a.png"},
    }.items():
        (folder / name).symlink_to(target)
    _, problems = inspect_dataset(folder)
    assert sorted(problems) == [
        "b.png: a link that leads out of the folder (--follow_symlinks follows it)",
        "folder: a link that leads out of the folder (--follow_symlinks follows it)",
        "gone.txt: a link to nothing",
    ]
    with pytest.raises(UsageError, match=r"nothing to read.*\n.*--follow_symlinks"):
        (folder / "a.txt").unlink()
        inspect_dataset(folder)


def test_bad_caption_files_are_problems_too(tmp_path):
    write_pair(tmp_path / "a.png", "fine")
    write_pair(tmp_path / "b.png", "")
    write_image(tmp_path / "c.png")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfa")
    pairs, problems = inspect_dataset(tmp_path)
    assert [pair.caption for pair in pairs] == ["fine"]
    assert [problem.partition(":")[0] for problem in problems] == ["c.txt", "b.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.write_text("x"), "not a folder"),
        (lambda p: p.mkdir(), "0 images"),
        (lambda p: (p / "metadata.jsonl").mkdir(parents=True), "not a regular file"),
        (lambda p: write_lines(p), "no usable row"),
        (lambda p: write_lines(p, "x".encode("utf-16")), "is UTF-16"),
        (lambda p: write_lines(p, row()), "a.png is missing"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(CaptionTrainError, match=message):
        inspect_dataset(tmp_path / "data")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.lists(texts.filter(str.strip), min_size=1))
def test_captions_survive_writing_and_reading(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.png").write_bytes(b"x")
    write_metadata(folder / "metadata.jsonl", ({"file_name": "a.png", "text": text} for text in captions))
    assert [pair.caption for pair in read_dataset(folder)] == [text.strip() for text in captions]


nasty = [None, True, 7, 1e308, "", " ", "a.png", "../a.png", "a\0", "\ud800", "x" * 5000, [], {}, ["a.png"]]
columns = st.sampled_from(["file_name", "text", "caption", "split", "other"])
rows = st.dictionaries(columns, st.sampled_from(nasty) | st.text(max_size=8), max_size=4)
lines = st.binary(max_size=60) | rows.map(lambda value: json.dumps(value).encode())


@settings(max_examples=1000)
@given(st.lists(lines, max_size=3))
def test_any_metadata_gives_pairs_or_one_error(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(b"x")
    (folder / "metadata.jsonl").write_bytes(b"\n".join(content))
    try:
        pairs, problems = inspect_dataset(folder)
    except CaptionTrainError:
        return
    assert all(pair.image == folder / "a.png" and pair.caption.strip() for pair in pairs)
    assert all(problem.startswith("metadata.jsonl:") for problem in problems)


def make_pairs(folder, contents):
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(b"%d" % content)
    return [Pair(folder / f"{number}.png", f"c{number}", "x") for number in range(len(contents))]


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 9), max_size=15),
    st.floats(0, 0.99),
    st.integers(0, 2**32),
    st.randoms(use_true_random=False),
)
def test_a_split_never_separates_identical_images(tmp_path_factory, contents, fraction, seed, random):
    pairs = make_pairs(tmp_path_factory.getbasetemp() / "split", contents)
    train, validation = split_by_content(pairs, fraction, seed)
    assert sorted([*train, *validation], key=pairs.index) == pairs
    assert not {p.image.read_bytes() for p in train} & {p.image.read_bytes() for p in validation}
    assert not contents or train
    shuffled = random.sample(pairs, len(pairs))
    assert set(split_by_content(shuffled, fraction, seed)[1]) == set(validation)


def test_a_split_has_the_size_asked_for_and_depends_on_the_seed(tmp_path):
    pairs = make_pairs(tmp_path, range(200))
    splits = [frozenset(split_by_content(pairs, 0.1, seed)[1]) for seed in range(5)]
    assert {len(split) for split in splits} == {20}
    assert len(set(splits)) == 5
    assert split_by_content(pairs, 0, 1) == (pairs, [])


def test_a_small_dataset_still_gets_a_validation_image(tmp_path):
    assert len(split_by_content(make_pairs(tmp_path, [1, 2, 3]), 0.1, 1)[1]) == 1
    assert split_by_content(make_pairs(tmp_path, [1, 1, 1]), 0.5, 1)[1] == []


def test_a_split_does_not_depend_on_names(tmp_path):
    pairs = make_pairs(tmp_path / "a", range(50))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    renamed = [
        Pair(p.image.rename(tmp_path / f"b/x{p.image.name}"), p.caption, "x")
        for p in make_pairs(tmp_path / "b", range(50))
    ]
    chosen = [{p.caption for p in split_by_content(s, 0.2, 3)[1]} for s in (pairs, renamed)]
    assert chosen[0] == chosen[1]


def test_a_fingerprint_tells_datasets_apart_wherever_they_lie(tmp_path):
    pairs = make_pairs(tmp_path / "a", range(5))
    moved = make_pairs(tmp_path / "b", range(5))
    assert hash_all(pairs) == hash_all(moved[::-1])
    assert hash_all(pairs) != hash_all(pairs[1:])
    assert hash_all(pairs) != hash_all([*pairs[1:], Pair(pairs[0].image, "edited", "x")])
    moved[0].image.write_bytes(b"9")
    assert hash_all(pairs) != hash_all(moved), "of the same size"
    assert hash_all([]) == hash_all([])


def test_a_linked_metadata_jsonl_is_written_through_its_link_and_one_to_nothing_is_replaced(tmp_path):
    for name, target in (("linked", tmp_path / "real.jsonl"), ("dangling", tmp_path / "gone.jsonl")):
        (tmp_path / "real.jsonl").write_text("")
        path = tmp_path / name / "metadata.jsonl"
        path.parent.mkdir()
        path.symlink_to(target)
        write_metadata(path, [{"file_name": "a.png", "text": "a"}])
        assert path.is_symlink() == (name == "linked")
        assert (tmp_path / "real.jsonl").read_text() == (path.read_text() if name == "linked" else "")
    assert not (tmp_path / "gone.jsonl").exists()


def test_a_captioned_image_of_a_format_that_is_not_read_is_a_problem_and_others_are_not(tmp_path):
    write_image(tmp_path / "a.png")
    for name in ("a.txt", "b.txt", "b.jxl", "drawing.svg"):
        (tmp_path / name).write_text("a caption")
    pairs, problems = inspect_dataset(tmp_path)
    assert [pair.image.name for pair in pairs] == ["a.png"]
    assert problems == ["b.jxl: .jxl files are not read: convert it to PNG or JPEG"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UsageError, match=r"1 \.jxl file is not read: convert it to PNG or JPEG"):
        read_dataset(tmp_path)

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_train.cli import compile_main
from caption_train.compiling import compile_captions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.metadata import read_dataset
from caption_train.options import CompileOptions
from tests.sample_folder import write_image, write_pair

ROOT = Path(__file__).parent.parent


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "my data"
    for name in ("a.png", "b/c.jpg", "b/train test val.png", "😀 é.webp"):
        write_pair(folder / name, f"caption of {name}")
    return folder


def compile_folder(folder, output=None, **options):
    return compile_captions(CompileOptions(folder, output, **options))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def counted(capsys, label):
    """Return the count the summary gives for a label, and the files listed under it."""
    table = capsys.readouterr().out
    match = re.search(rf"^ +{label} +([\d,]+).*\n((?:     .*\n)*)", table, re.MULTILINE)
    return int(match[1].replace(",", "")), [line.strip() for line in match[2].splitlines()]


def load_imagefolder(folder, cache):
    from datasets import load_dataset

    return load_dataset(
        "imagefolder", data_dir=str(folder), data_files={"train": "**"}, split="train", cache_dir=str(cache)
    )


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


@pytest.mark.parametrize("output", [None, "..", "../elsewhere"])
def test_datasets_loads_the_result(dataset, tmp_path, output):
    output = dataset / output if output else None
    compile_folder(dataset, output, validation_split=0.3)
    loaded = load_imagefolder(output or dataset, tmp_path / "cache")
    assert sorted(loaded["text"]) == sorted(
        pair.caption for pair in read_dataset(output or dataset, split=None)
    )
    assert loaded.column_names == ["image", "text", "split"]
    assert all(image.size == (4, 3) for image in loaded["image"])


def test_datasets_loads_plain_names_without_data_files(tmp_path):
    from datasets import load_dataset

    write_pair(tmp_path / "data/sub/a.png", "a dog")
    compile_folder(tmp_path / "data")
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["text"][:] == ["a dog"]


def test_repeated_rows_load_too(tmp_path):
    write_pair(tmp_path / "data/3_dog/a.png", "a dog")
    write_pair(tmp_path / "data/b.png", "no folder")
    compile_folder(tmp_path / "data", kohya_repeats=True)
    assert len(load_imagefolder(tmp_path / "data", tmp_path / "cache")) == 4


def test_the_summary_counts_and_lists_every_kind_of_leftover(dataset, capsys):
    write_image(dataset / "alone.png")
    (dataset / "nobody.txt").write_text("x")
    write_pair(dataset / "blank.png", " \n")
    write_image(dataset / "a.gif")
    (dataset / "a.caption").write_text("second")
    (dataset / ".hidden.png").touch()
    (dataset / "loop").symlink_to(dataset)
    os.mkfifo(dataset / "pipe.png")
    expected = {
        "images": (7, []),
        "caption files": (7, []),
        "pairs": (5, []),
        "empty captions": (1, ["blank.txt"]),
        "images without a caption": (1, ["alone.png"]),
        "captions without an image": (1, ["nobody.txt"]),
        "captions of several images": (1, ["a.txt: a.gif, a.png"]),
        "captions not used": (1, ["a.caption"]),
        "links not followed": (1, ["loop"]),
        "no files, or unreadable folders": (1, ["pipe.png: not a regular file"]),
        "hidden, skipped": (1, [".hidden.png"]),
    }
    for label, found in expected.items():
        assert compile_folder(dataset, overwrite=True) == 0
        assert counted(capsys, label) == found, label


def test_long_lists_are_cut_unless_asked_for(dataset, capsys):
    for number in range(30):
        write_image(dataset / f"x{number}.png")
    compile_folder(dataset)
    assert "… and 10 more" in counted(capsys, "images without a caption")[1][-1]
    compile_folder(dataset, list_all=True)
    assert len(counted(capsys, "images without a caption")[1]) == 30


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, r"no pair .*\(0 images, 0 caption files\)$"),
        (lambda f: write_image(f / "a.png"), "--caption_extension"),
        (lambda f: (f / "a.txt").write_text("x"), "1 caption files"),
        (
            lambda f: (write_image(f / "a.png"), (f / "metadata.jsonl").touch()),
            "which training reads as it is",
        ),
        (lambda f: (f / "a.png").symlink_to(write_image(f.parent / "x.png")), "--follow_symlinks"),
        (lambda f: write_pair(f / "a\\b.png", "x"), "all were left out"),
    ],
)
def test_nothing_found_says_why_and_writes_nothing(tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(CaptionTrainError, match=message):
        compile_folder(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_cannot_be_written_is_one_line(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CaptionTrainError, match=r"(?s)^[^\n]*file[^\n]*$"):
        compile_folder(dataset, tmp_path / "file/out")
    (dataset / "metadata.jsonl").mkdir()
    with pytest.raises(CaptionTrainError, match=r"^[^\n]*metadata\.jsonl[^\n]*$"):
        compile_folder(dataset, overwrite=True)


def test_the_next_command_survives_the_shell(dataset, capsys):
    compile_folder(dataset)
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.strip().startswith("accelerate launch train_florence_lora.py --dataset_dir '")
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines()[4] == str(dataset)


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


def blocks_of(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_what_the_page_shows_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_pair(Path("images/cat.jpg"), "a cat on a mat")
    write_pair(Path("images/parks/bench.png"), "an empty bench, autumn leaves")
    write_pair(Path("kohya/10_dog/a.png"), "a dog")
    Path("kohya/meta_clean.json").write_text('{"a": {"caption": "a dog", "tags": "grass"}}')
    commands = "".join(blocks_of("docs/dataset.md", "bash")).splitlines()
    assert len(commands) == 7
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "compile_captions.py")
        assert compile_main(arguments) == 0, command
    assert len(rows_of(Path("dataset"))) == 2
    assert rows_of(Path("kohya")) == [{"file_name": "10_dog/a.png", "text": "a dog, grass"}] * 10
    (snippet,) = blocks_of("docs/dataset.md", "python")
    names = {}
    exec(snippet, names)
    assert len(names["dataset"]) == 2


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "compile_captions.py", *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_the_script_compiles_on_a_terminal_that_knows_only_ascii(dataset):
    write_image(dataset / "🐈.png")
    done = run_script(dataset, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b""
    assert b"\\U0001f408.png" in done.stdout


def test_errors_of_the_script_are_exit_codes_and_lines(tmp_path):
    for arguments, code in (([tmp_path], 1), ([tmp_path / "none"], 2), (["--validation_split", "7"], 2)):
        done = run_script(*arguments)
        assert done.returncode == code
        assert b"Traceback" not in done.stderr and done.stderr.startswith(b"compile_captions.py: ")


def test_neither_torch_nor_datasets_is_imported(dataset):
    code = (
        "import sys; from caption_train.cli import compile_main; compile_main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, dataset], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

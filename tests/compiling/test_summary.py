import os
import subprocess

import pytest

from caption_train.errors import CaptionTrainError
from caption_train.families import FAMILIES, get_family
from tests.fixtures.sample_set import compile_folder, counted, make_folder, write_image, write_pair


@pytest.fixture
def dataset(tmp_path):
    return make_folder(tmp_path / "my data")


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


def test_the_next_command_survives_the_shell(dataset, capsys):
    compile_folder(dataset)
    commands = capsys.readouterr().out.splitlines()[-len(FAMILIES) :]
    for command, family in zip(commands, map(get_family, FAMILIES), strict=True):
        assert command.strip().startswith(f"python {family.training_script} --dataset_dir '")
        printed = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
        )
        assert printed.stdout.splitlines()[3] == str(dataset)


def test_the_next_command_follows_links_where_the_dataset_holds_them(dataset, tmp_path, capsys):
    compile_folder(dataset, follow_symlinks=True)
    assert capsys.readouterr().out.rstrip().endswith(" --follow_symlinks")
    compile_folder(dataset, tmp_path / "out", follow_symlinks=True)
    assert "--follow_symlinks" not in capsys.readouterr().out

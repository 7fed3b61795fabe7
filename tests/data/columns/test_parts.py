"""A folder that is read in parts is the folder that is read at once."""

import json
import random

import pytest

from caption_train.data.columns import parts
from caption_train.data.columns.table import Pairs, PairTable
from caption_train.data.dataset import inspect_dataset, inspect_table
from caption_train.data.pairs import match_captions
from caption_train.data.scan import scan_folder

EXTENSIONS = (".wd14.txt", ".txt", ".caption")
SUFFIXES = (".png", ".PNG", ".jpg", ".txt", ".png.txt", ".caption", ".jxl", ".TXT", ".wd14.txt", ".a.png")
CONTENTS = (b"", b"a caption", b"a\0b", b"word", b"\xff\xfe")


def make_tree(root, files=150, folders=("", "a", "b/c", "b", "ü")):
    rng = random.Random(7)
    for _ in range(files):
        folder = root / rng.choice(folders)
        folder.mkdir(parents=True, exist_ok=True)
        stem = rng.choice(["x", "y", "a.b", "a", "a-b", "Z"]) + str(rng.randrange(12))
        for suffix in rng.sample(SUFFIXES, 3):
            (folder / (stem + suffix)).write_bytes(rng.choice(CONTENTS))
    return root


@pytest.mark.parametrize("folders", [("", "a", "b/c", "b", "ü"), ("",)])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_parts_of_any_size_give_the_same_pairs_and_problems(size, folders, tmp_path, monkeypatch):
    root = make_tree(tmp_path, folders=folders)
    expected, problems = inspect_dataset(root, caption_extensions=EXTENSIONS)
    matches = match_captions(scan_folder(root, EXTENSIONS), EXTENSIONS)
    assert expected == [pair for pair in matches.pairs.values() if pair.image.stat().st_size]
    monkeypatch.setattr(parts, "FILES", size)
    counts = []

    def work(every):
        every = list(every)
        counts.append(len(every))
        return parts.read_here(every)

    pairs, more = inspect_table(root, caption_extensions=EXTENSIONS, work=work)
    assert list(pairs) == expected and sorted(more) == sorted(problems) and counts[0] > 2


def test_rows_in_parts_are_the_rows_of_the_file(tmp_path, monkeypatch):
    lines = []
    for number in range(11):
        (tmp_path / f"{number}.png").write_bytes(b"x")
        row = {"file_name": f"{number}.png", "text": f"caption {number}", "prompt": f"p{number % 3}"}
        lines.append(json.dumps(row))
    lines[4:4] = ["", "no json", '{"file_name": "none.png", "text": "c"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    expected, problems = inspect_dataset(tmp_path)
    monkeypatch.setattr(parts, "ROWS", 3)
    assert inspect_dataset(tmp_path) == (expected, problems)
    assert [pair.source for pair in expected][3:5] == ["metadata.jsonl:4", "metadata.jsonl:8"]
    assert len(problems) == 2


def test_an_empty_part_joins_with_others(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a")
    found = parts.FilesPart(tmp_path, ["a.png", "a.txt"], EXTENSIONS, "utf-8").read()
    empty = parts.FilesPart(tmp_path, [], EXTENSIONS, "utf-8").read()
    joined = parts.join_files([empty, found, empty])
    assert [pair.caption for pair in Pairs(joined.table)] == ["a"] and joined.images == joined.captions == 1
    assert len(PairTable.join([])) == 0

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from caption_train.cli.commands import compile_main
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.sample_set import make_folder, rows_of, write_image, write_pair


@pytest.fixture
def dataset(tmp_path):
    return make_folder(tmp_path / "my data")


def blocks_of(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (REPOSITORY / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_what_the_page_shows_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_pair(Path("images/cat.jpg"), "a cat on a mat")
    write_pair(Path("images/parks/bench.png"), "an empty bench, autumn leaves")
    write_pair(Path("kohya/10_dog/a.png"), "a dog")
    Path("kohya/meta_clean.json").write_text('{"a": {"caption": "a dog", "tags": "grass"}}')
    commands = "".join(blocks_of("docs/dataset.md", "bash")).splitlines()
    assert len(commands) == 11
    write_other_tools_files()
    for command in commands:
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "compile_captions.py")
        assert compile_main(arguments) == 0, command
    assert len(rows_of(Path("dataset"))) == 2
    assert [row["text"] for row in rows_of(Path("photos"))] == ["a hill", "the sea"]
    assert [row.get("prompt") for row in rows_of(Path("llava"))] == ["Who?"] and len(
        rows_of(Path("coco"))
    ) == 2
    assert rows_of(Path("kohya")) == [{"file_name": "10_dog/a.png", "text": "a dog, grass"}] * 10
    (snippet,) = blocks_of("docs/dataset.md", "python")
    names = {}
    exec(snippet, names)
    assert len(names["dataset"]) == 2


def write_other_tools_files():
    """Write the files of the page's section on captions in one file, with their images."""
    from pyarrow import Table, parquet

    for name in ("llava/a.png", "coco/a.png", "coco/b.png", "photos/a.png", "photos/b.png"):
        write_image(Path(name), (0, 0, len(name) * ord(name[-5]) % 256))
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Nobody."}]
    Path("llava_instruct.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    images = [{"id": n, "file_name": f"{n}.png"} for n in "ab"]
    said = [{"image_id": n, "caption": f"it is {n}"} for n in "ab"]
    Path("captions_train2017.json").write_text(json.dumps({"images": images, "annotations": said}))
    parquet.write_table(Table.from_pylist([{"image": {"path": "a.png"}, "text": "a hill"}]), "train.parquet")
    Path("more.csv").write_text("file_name,text,prompt\nb.png,the sea,What?\n")


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, REPOSITORY / "compile_captions.py", *arguments],
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
        "import sys; from caption_train.cli.commands import compile_main;"
        "compile_main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, dataset], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr

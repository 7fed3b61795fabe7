"""The command as people call it: what it prints, refuses, and leaves when it is ended."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib

import httpx
import pytest

from caption_train.cli.commands import main, review_main
from tests.fixtures.paths import REPOSITORY


def test_ctrl_c_ends_a_review_with_the_command_that_trains_on_it(folder, tmp_path):
    command = [sys.executable, str(REPOSITORY / "review_captions.py"), str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("Review 4 images (3 with a caption, 0 accepted) at http://127.0.0.1:")
        address = re.search(r"(http://\S+?)/?\s*$", line)[1]
        token = re.search('page-token" content="([^"]+)"', httpx.get(f"{address}/").text)[1]
        ids = httpx.get(f"{address}/api/ids").json()["ids"]
        headers = {"origin": address, "x-review-token": token}
        values = {"ids": ids, "accepted": True}
        assert httpx.post(f"{address}/api/mark", json=values, headers=headers).status_code == 200
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "3 accepted" in error and "Traceback" not in error
    assert f"--dataset_dir {tmp_path / 'photos-accepted'} --output_dir loras/photos-accepted" in out
    assert len((tmp_path / "photos-accepted/metadata.jsonl").read_text().splitlines()) == 3


def test_the_wheel_holds_all_that_the_page_loads():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    (pattern,) = project["tool"]["setuptools"]["package-data"]["caption_train.reviewing"]
    folder = REPOSITORY / "caption_train/reviewing"
    static = sorted((folder / "static").rglob("*"))
    assert len(static) > 5 and sorted(folder.glob(pattern)) == static


def refuse(arguments, capsys, code=2):
    assert review_main([*map(str, arguments)]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_what_cannot_work_is_one_line(folder, tmp_path, capsys, monkeypatch):
    assert "--images" in refuse([], capsys)
    assert "no such folder" in refuse([tmp_path / "no"], capsys)
    (tmp_path / "empty").mkdir()
    assert "no images there" in refuse([tmp_path / "empty"], capsys)
    assert "--family is required" in refuse([folder, "--base_model", "x", "--port", "0"], capsys)
    assert "--peft_model" in refuse([folder, "--peft_model", tmp_path / "no", "--port", "0"], capsys)
    assert "--output_dir" in refuse([folder, "--output_dir", folder / "inside", "--port", "0"], capsys)
    assert "--output_dir" in refuse([folder, "--output_dir", tmp_path, "--port", "0"], capsys)
    assert "--host" in refuse([folder, "--host", "no such host", "--port", "0"], capsys)
    assert "--prompt is for a model" in refuse([folder, "--prompt", "x"], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port" in refuse([folder, "--port", taken.getsockname()[1]], capsys, code=1)


def test_without_the_extra_one_line_says_how_to_get_it(folder, capsys, monkeypatch):
    from caption_train.reviewing import server

    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert "pip install '.[review]'" in refuse([folder], capsys)


def test_a_folder_of_something_else_is_not_written_over(folder, tmp_path, capsys):
    (tmp_path / "photos-accepted").mkdir()
    (tmp_path / "photos-accepted/mine.txt").write_text("mine")
    assert "holds something else" in refuse([folder, "--port", "0"], capsys)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(folder, capsys):
    folder.chmod(0o500)
    assert "cannot be written to" in refuse([folder, "--port", "0"], capsys)
    folder.chmod(0o700)


def test_the_installed_command_reviews_too(capsys):
    assert main(["review"]) == 2
    assert "--images is required" in capsys.readouterr().err


def test_help_answers_at_once():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "review_captions.py"), "--help"], capture_output=True
    )
    print(f"--help: {time.monotonic() - started:.2f} s")
    assert done.returncode == 0 and b"--peft_model" in done.stdout

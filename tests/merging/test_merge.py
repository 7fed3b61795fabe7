"""Independent jobs with `--shard`: each image once, resumable, put together to what one job writes."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.job import caption_folder
from caption_train.captioning.storage.shard import Shard
from caption_train.cli.commands import main, merge_main
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import CaptionTrainError
from tests.fixtures.fake_family import FakeFamily

COUNT = 12
NAMES = [f"{number}.png" for number in range(COUNT)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 6), (number * 20,) * 3).save(folder / name)
    return folder


def run(folder, shard=None, family=None, **options):
    settings = {"images": [str(folder)], "num_workers": 0, "batch_size": 2, "shard": shard} | options
    return caption_folder(CaptionOptions(**settings), family or FakeFamily())


class Answering(FakeFamily):
    """Has answers beside its captions; with one token to a caption, also remarks. A dataset holds neither."""

    def parse_answer(self, text, prompt, size):
        return {"boxes": [[0, 0, *size]]}


def run_shards(folder, count=3, **options):
    return [run(folder, f"{index}/{count}", **options) for index in range(1, count + 1)]


def merge(folder, *arguments):
    return merge_main([str(folder), *map(str, arguments)])


def of_shard(folder, index, count=3):
    return [path.name for path in find_inputs([str(folder)], shard=Shard(index, count)).images]


@pytest.mark.parametrize(
    ("name", "options", "columns"),
    [
        ("captions.jsonl", {}, []),
        ("captions.csv", {"max_token_length": 1}, []),
        ("metadata.jsonl", {}, []),
        ("metadata.jsonl", {"max_token_length": 1, "family": Answering()}, []),
        ("captions.csv", {"prompts": ["short=a", "long=b"]}, ["--columns", "short", "long"]),
    ],
)
def test_merged_shards_are_the_bytes_of_one_job(folder, capsys, name, options, columns):
    run(folder, output=folder / name, **options)
    expected = (folder / name).read_bytes()
    (folder / name).unlink()
    assert run_shards(folder, output=folder / name, **options) == [0, 0, 0]
    assert not (folder / name).exists()
    assert merge(folder, "--output", folder / name, *columns) == 0
    assert (folder / name).read_bytes() == expected
    assert f"{COUNT} of {COUNT} images captioned in {folder / name}, from 3 shards" in capsys.readouterr().err
    assert merge(folder, "--output", folder / name, *columns) == 0
    assert (folder / name).read_bytes() == expected
    assert not list(folder.glob(".*"))


def test_each_image_is_captioned_by_one_shard(folder):
    families = [FakeFamily() for _ in range(3)]
    for index, family in enumerate(families, 1):
        run(folder, f"{index}/3", family, save_captions=True)
    assert sum(sum(family.model.batches) for family in families) == COUNT
    assert len(list(folder.glob("*.txt"))) == COUNT and not list(folder.glob(".*"))


def test_a_killed_shard_goes_on_and_a_merge_takes_what_it_left(folder, capsys):
    output = folder / "captions.jsonl"
    run(folder, output=output)
    expected = output.read_bytes()
    output.unlink()

    def is_written():
        return sum(part.read_text().count("say") for part in folder.glob(".*.part")) >= 2

    child = os.fork()
    if not child:
        run(folder, "1/3", Dying(is_written), output=output)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    for index in (2, 3):
        run(folder, f"{index}/3", output=output)
    copy = shutil.copytree(folder, folder.parent / "copy")
    assert merge(copy, "--output", copy / output.name) == 1
    lacking = of_shard(folder, 1)[2:]
    err = capsys.readouterr().err
    assert f"{len(lacking)} image without a caption:" in err
    assert [line.strip() for line in err.splitlines() if "/copy/" in line and line.startswith("  ")] == [
        str(copy / name) for name in lacking
    ]
    family = FakeFamily()
    assert run(folder, "1/3", family, output=output) == 0
    assert sum(family.model.batches) == len(lacking)
    assert merge(folder, "--output", output) == 0
    assert output.read_bytes() == expected


def test_a_shard_that_did_not_run_is_named(folder, capsys):
    output = folder / "captions.jsonl"
    for index in (1, 3):
        run(folder, f"{index}/3", output=output)
    assert merge(folder, "--output", output) == 1
    err = capsys.readouterr().err
    assert "1 shard of 3 without a file: 2" in err
    assert all(f"  {folder / name}" in err for name in of_shard(folder, 2))
    assert len(output.read_text().splitlines()) == COUNT - len(of_shard(folder, 2))


def test_an_image_in_two_shards_is_named_and_nothing_written(folder, capsys):
    output = folder / "captions.jsonl"
    run_shards(folder, output=output)
    name = of_shard(folder, 1)[0]
    with (folder / "captions.shard-2-of-3.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": "again"}) + "\n")
    assert merge(folder, "--output", output) == 1
    assert f"  {name}: in shard 1/3 and in shard 2/3" in capsys.readouterr().err
    assert not output.exists()


def test_captions_of_before_are_seen_by_shards_and_stay(folder, capsys):
    output = folder / "captions.jsonl"
    rows = [{"file_name": "3.png", "text": "by hand", "n": 1.50}, {"file_name": "5.png", "n": 2}]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    families = [FakeFamily() for _ in range(3)]
    for index, family in enumerate(families, 1):
        run(folder, f"{index}/3", family, output=output)
    assert sum(sum(family.model.batches) for family in families) == COUNT - 1
    assert merge(folder, "--output", output) == 0
    merged = {row["file_name"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert list(merged) == NAMES
    assert merged["3.png"] == rows[0] and merged["5.png"]["n"] == 2 and merged["5.png"]["text"]


def test_what_somebody_wrote_into_the_merged_file_stays_unless_overwrite_is_given(folder, capsys):
    output = folder / "captions.jsonl"
    run_shards(folder, output=output)
    merge(folder, "--output", output)
    made = output.read_text()
    output.write_text(made.replace("say dark", "by hand", 1))
    assert merge(folder, "--output", output) == 0
    assert "by hand" in output.read_text()
    assert "1 image had another caption there, which stays (--overwrite" in capsys.readouterr().err
    assert merge(folder, "--output", output, "--overwrite") == 0
    assert output.read_text() == made


def test_caption_files_are_checked(folder, capsys):
    run_shards(folder, save_captions=True)
    assert merge(folder, "--save_captions") == 0
    (folder / "4.txt").unlink()
    assert merge(folder, "--save_captions") == 1
    assert f"1 image without a caption file:\n  {folder / '4.png'}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no files of shards beside it, such as captions\.shard-1-of-8\.jsonl"),
        (["shard-1-of-2", "shard-1-of-4"], "files of --shard I/2 and I/4: move"),
        (["shard-0-of-2", "shard-01-of-2", "shard-3-of-2"], "no files of shards"),
    ],
)
def test_what_cannot_be_merged_is_one_line(folder, capsys, files, message):
    for name in files:
        (folder / f"captions.{name}.jsonl").touch()
    assert main(["merge", "--images", str(folder), "--output", str(folder / "captions.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


class Dying(FakeFamily):
    """Is killed with -9 in its second batch, when `is_written` says that the first one's captions are."""

    def __init__(self, is_written):
        super().__init__()
        self.is_written = is_written

    def generate(self, *arguments, **settings):
        if self.model.batches:
            deadline = time.monotonic() + 20
            while not self.is_written():
                assert time.monotonic() < deadline, "no caption was written"
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(*arguments, **settings)


class During(FakeFamily):
    """Calls `work` while it captions."""

    def __init__(self, work):
        super().__init__()
        self.work = work

    def generate(self, *arguments, **settings):
        if not self.model.batches:
            self.work()
        return super().generate(*arguments, **settings)


def test_other_shards_of_one_folder_may_run_at_once_the_same_and_other_splits_not(folder):
    def work():
        assert run(folder, "2/3", save_captions=True, output=output) == 0
        for shard in ("1/3", "1/4", None):
            with pytest.raises(CaptionTrainError, match="another run") as caught:
                run(folder, shard, save_captions=True)
            assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(CaptionTrainError, match=r"shard-1-of-3\.jsonl: another run"):
            run(folder, "1/3", output=output)
        assert merge(folder, "--output", output) == 1

    output = folder.parent / "captions.jsonl"
    assert run(folder, "1/3", During(work), save_captions=True, output=output) == 0
    assert run(folder, "3/3", save_captions=True, output=output) == 0
    assert len(list(folder.glob("*.txt"))) == COUNT and not list(folder.glob(".*"))
    assert merge(folder, "--output", output, "--save_captions") == 0


def test_a_shard_is_refused_while_a_job_of_all_is_at_work(folder):
    def work():
        with pytest.raises(CaptionTrainError, match="another run"):
            run(folder, "2/3", save_captions=True)

    assert run(folder, None, During(work), save_captions=True) == 0


def test_locks_that_a_killed_job_of_another_split_left_are_cleared(folder):
    child = os.fork()
    if not child:
        run(folder, "1/4", During(lambda: os.kill(os.getpid(), signal.SIGKILL)), save_captions=True)
        os._exit(0)
    os.waitpid(child, 0)
    assert list(folder.glob(".*.lock"))
    assert run_shards(folder, save_captions=True) == [0, 0, 0]
    assert not list(folder.glob(".*"))


def test_what_a_killed_job_of_another_split_has_added_is_not_added_again(folder):
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_text("old\n")

    def is_written():
        return sum("say" in path.read_text() for path in folder.glob("*.txt")) == 2

    child = os.fork()
    if not child:
        run(folder, "1/2", Dying(is_written), save_captions=True, existing="append")
        os._exit(0)
    os.waitpid(child, 0)
    for shard in ("1/3", None):
        with pytest.raises(CaptionTrainError, match=r"with --shard I/2 that adds to captions was cut short"):
            run(folder, shard, save_captions=True, existing="append")
    assert run_shards(folder, 2, save_captions=True, existing="append") == [0, 0]
    texts = [(folder / name).with_suffix(".txt").read_text() for name in NAMES]
    assert all(text.count("say") == 1 and text.startswith("old, ") for text in texts)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", "1/ 2"])
def test_a_shard_that_there_is_not_is_refused(shard):
    (problem,) = CaptionOptions(images=["a"], shard=shard).check()
    assert problem.startswith(f"--shard {shard} is not I/N")


def test_adding_to_rows_in_shards_is_refused():
    options = CaptionOptions(images=["a"], shard="1/2", output=Path("c.jsonl"), existing="append")
    assert any("drop --output" in problem for problem in options.check())

"""What a run finds and leaves in an output folder: another run's log and best, links, its own data."""

import json
import os
import shutil
import signal
import stat
from dataclasses import replace

import pytest

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.files import follow_pointer
from caption_train.training.checkpoints.find import BEST, find_last_run
from caption_train.training.monitor.log import LOG_FILE
from caption_train.training.prepare import prepare_training
from tests.fixtures.forked import start
from tests.fixtures.kills import die_at
from tests.fixtures.runs import make_options, read_log, train, write_pairs

PAIRS = 6
VALIDATED = {"epochs": 1, "validation_split": 0.2, "eval_every_n_steps": 1, "save_every_n_steps": 1}


@pytest.fixture(scope="module")
def trained(base, pairs, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    train("blip", make_options("blip", base, pairs, folder, epochs=1))
    return folder


@pytest.fixture
def out(trained, tmp_path):
    """A copy of that folder, where `make` has its runs write."""
    return shutil.copytree(trained, tmp_path / "out", symlinks=True)


def logs(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("log*.jsonl")}


def test_a_second_run_keeps_the_log_of_the_first_and_forgets_its_best(make, tmp_path):
    out = tmp_path / "out"
    train("blip", make(**VALIDATED))
    first, log = find_last_run(out), (out / LOG_FILE).read_text()
    assert (out / BEST).is_symlink()
    train("blip", make(epochs=1, seed=7))
    assert logs(out)[f"log-{first}.jsonl"] == log and len(logs(out)) == 2
    assert read_log(out) != [json.loads(line) for line in log.splitlines()]
    assert not os.path.lexists(out / BEST)


def test_a_third_run_names_the_log_of_one_that_was_killed_before_it_saved_by_its_date(make, out, tmp_path):
    first, log = find_last_run(out), (out / LOG_FILE).read_text()

    def work():
        die_at("after the gradient", 2)
        train("blip", make(epochs=1, seed=7))

    assert start(work, tmp_path / "said").wait() == -signal.SIGKILL
    killed = (out / LOG_FILE).read_text()
    train("blip", make(epochs=1, seed=8))
    found = logs(out)
    assert found.pop(f"log-{first}.jsonl") == log
    (date,) = found.keys() - {LOG_FILE}
    assert found[date] == killed and date.removeprefix("log-")[:8].isdigit()


def test_the_first_run_resumed_gets_its_log_back(make, out):
    checkpoint, log = follow_pointer(out / "last"), (out / LOG_FILE).read_text()
    train("blip", make(epochs=1, seed=7))
    second, other = find_last_run(out), (out / LOG_FILE).read_text()
    train("blip", make(epochs=2, resume=str(checkpoint)))
    found = logs(out)
    assert found.pop(f"log-{second}.jsonl") == other
    assert found.keys() == {LOG_FILE} and found[LOG_FILE].startswith(log)


def test_a_run_resumed_from_elsewhere_keeps_the_log_that_was_there(make, trained, tmp_path):
    train("blip", make("two", epochs=1, seed=7))
    run, log = find_last_run(tmp_path / "two"), (tmp_path / "two" / LOG_FILE).read_text()
    for _ in range(2):
        train("blip", make("two", epochs=2, resume=str(trained / "last")))
        found = logs(tmp_path / "two")
        assert found.pop(f"log-{run}.jsonl") == log and found.keys() == {LOG_FILE}
        assert found[LOG_FILE].startswith((trained / LOG_FILE).read_text())


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("name", [LOG_FILE, "summary.json", "training_curve.png", "training.json", ".lock"])
def test_nothing_is_written_through_a_link_of_a_file_of_ours(make, trained, tmp_path, name, resumes):
    out, outside = tmp_path / "out", tmp_path / "outside"
    if resumes:
        shutil.copytree(trained, out, symlinks=True)
        (out / name).unlink(missing_ok=True)
    else:
        out.mkdir()
    for target in (outside, tmp_path / "nowhere"):
        outside.write_text("theirs")
        (out / name).symlink_to(target)
        try:
            train("blip", make(epochs=2 if resumes else 1, resume="auto" if resumes else None))
        except CaptionTrainError as error:
            assert len(str(error).splitlines()) == 1 and "is a link" in str(error)
            assert name in str(error)
        assert outside.read_text() == "theirs" and not (tmp_path / "nowhere").exists()
        (out / name).unlink(missing_ok=True)


def test_a_log_that_is_a_folder_is_one_line(make, tmp_path):
    (tmp_path / "out" / LOG_FILE).mkdir(parents=True)
    with pytest.raises(CaptionTrainError, match=r"could not save log\.jsonl: Is a directory") as caught:
        train("blip", make(epochs=1))
    assert caught.value.exit_code == 1 and (tmp_path / "out" / LOG_FILE).is_dir()


@pytest.mark.parametrize("name", ["dataset_dir", "validation_dir"])
def test_images_are_never_trained_into_their_own_folder(make, tmp_path, name):
    images = write_pairs(tmp_path / "images", 2)
    (tmp_path / "link").symlink_to(images)
    before = sorted(images.iterdir())
    with pytest.raises(UsageError, match=f"--output_dir .*link: holds .*, --{name}; choose another"):
        prepare_training(replace(make("link"), **{name: images}), get_family("blip"))
    assert sorted(images.iterdir()) == before


def test_checkpoints_have_the_permissions_of_any_other_file(trained, tmp_path):
    (tmp_path / "ordinary").touch()
    files = [path for path in trained.rglob("*") if path.is_file()]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in files}
    assert any(path.suffix == ".safetensors" for path in files)
    assert modes == {stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)}

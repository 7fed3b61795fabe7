"""What a resumed run finds: checkpoints lost, damaged, abandoned or elsewhere, and its `last` and `best`."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.files import follow_pointer
from caption_train.training.checkpoints.find import find_latest, list_checkpoints, point
from caption_train.training.monitor.validation import Evaluator
from tests.fixtures.runs import make_options, prepare_run, read_log, train

PAIRS = 6
RUN = {"epochs": 1, "save_every_n_steps": 1, "validation_split": 0.2, "eval_every_n_steps": 1}


@pytest.fixture(scope="module")
def falling():
    """Within it, the second validation is the best of three; before them, the base is measured."""

    @contextmanager
    def patching():
        losses = iter([4.0, 3.0, 1.0, 2.0])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Evaluator, "evaluate", lambda self: {"loss": next(losses)})
            yield

    return patching


@pytest.fixture(scope="module")
def trained(base, pairs, falling, tmp_path_factory):
    """The folder of a run, which each test gets a copy of."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    with falling():
        train("blip", make_options("blip", base, pairs, folder, **RUN))
    return folder


@pytest.fixture
def finished(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out", symlinks=True)


def resume(make, **changes):
    return prepare_run(make(**{"resume": "auto", **changes}), get_family("blip"))


def find(folder, step):
    (found,) = folder.glob(f"*{step:06d}*") if step < 3 else folder.glob("epoch-*")
    return found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "[]"),
        ("manifest.json", "{}"),
        ("manifest.json", '"x"'),
        ("manifest.json", "[" * 100_000),
        ("manifest.json", '{"state/progress.json": "0", "a\\u0000b": 1}'),
        ("state", None),
        ("manifest.json", None),
    ],
)
def test_auto_names_what_is_damaged_and_takes_the_one_before(finished, make, capsys, name, content):
    path = find(finished, 3) / name
    if content is not None:
        path.write_text(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert resume(make).run.plan.first_step == 2
    words = capsys.readouterr().err
    assert f"--resume auto: {path.parent}: " in words and "passed over" in words


@pytest.mark.parametrize("emptied", [True, False])
def test_auto_says_when_last_leads_to_nothing(finished, make, capsys, emptied):
    path = (finished / "last").resolve()
    shutil.rmtree(path)
    if emptied:
        path.mkdir()
    assert resume(make).run.plan.first_step == 2
    words = capsys.readouterr().err
    assert f"last: leads to {path.name}, which is no checkpoint; passed over" in words


def test_a_copy_in_which_last_is_a_folder_goes_on(finished, make, monkeypatch, tmp_path):
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": 9.0})
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert not (copy / "last").is_symlink()
    assert train("blip", make("copy", resume="auto", epochs=2))["global_step"] == 6
    assert (copy / "last").is_symlink() and (copy / "best").is_symlink()


def test_a_checkpoint_copied_as_last_goes_on_elsewhere(finished, make, tmp_path):
    copy = shutil.copytree(finished / "last", tmp_path / "usb" / "last")
    train("blip", make("new", resume=str(copy)))
    assert (tmp_path / "new" / "last").resolve().name == "step-000003"


def test_links_that_lead_round_in_a_loop_are_no_checkpoint(finished, make):
    (finished / "best").unlink()
    (finished / "best").symlink_to("best")
    with pytest.raises(UsageError, match="there is no folder"):
        resume(make, resume=str(finished / "best"))
    assert resume(make).train()["best_step"] == 2


def test_where_no_checkpoint_is_whole_the_run_starts_anew_and_says_so(finished, make, capsys):
    for path in list_checkpoints(finished):
        (path / "manifest.json").write_bytes(b"")
    assert resume(make).run.plan.first_step == 0
    assert "--resume auto: all are damaged; starting anew" in capsys.readouterr().err


def test_a_folder_without_state_or_a_missing_one_is_told_in_one_line(finished, make, tmp_path):
    adapter = shutil.copytree(find(finished, 2), tmp_path / "adapter")
    shutil.rmtree(adapter / "state")
    with pytest.raises(CaptionTrainError, match=r"state/\S+ is missing"):
        resume(make, resume=str(adapter))
    (adapter / "manifest.json").unlink()
    with pytest.raises(UsageError, match="has no training state to go on from"):
        resume(make, resume=str(adapter))
    with pytest.raises(UsageError, match="the checkpoints in it are epoch-"):
        resume(make, resume=str(finished))
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("gone", "dangling"):
        with pytest.raises(UsageError, match="there is no folder"):
            resume(make, resume=str(tmp_path / name))


def test_falling_back_points_last_and_best_at_what_is_gone_on_from(finished, make):
    (find(finished, 3) / "state" / "progress.json").write_bytes(b"")
    resume(make)
    assert (finished / "last").resolve() == (finished / "best").resolve() == find(finished, 2)


def test_a_best_that_is_lost_is_sought_anew(finished, make, capsys):
    shutil.rmtree(find(finished, 2))
    progress = resume(make, load_best_at_end=True).run.progress
    assert progress.best_step is progress.best_value is None
    assert "the best checkpoint, of step 2, is gone" in capsys.readouterr().err


def test_after_going_back_auto_goes_on_from_the_new_branch(finished, make, monkeypatch):
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": 9.0})
    first = find(finished, 1)
    back = resume(make, resume=str(first))
    assert (finished / "best").resolve().name == f"{first.name}-2"
    back.saver.after_step = lambda step: back.saver.save("branched") if step == 1 else None
    back.train()
    assert find_latest(finished)[0].name == "branched"


def test_auto_goes_on_from_where_a_run_went_back_to_before_it_has_saved(finished, make, monkeypatch):
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": 9.0})
    back = resume(make, resume=str(find(finished, 1)))
    back.lock.abandon()
    assert resume(make).run.plan.first_step == 1
    train("blip", make(resume="auto"))
    assert [line["step"] for line in read_log(finished) if "loss" in line] == [1, 2, 3]


def test_a_checkpoint_of_an_older_run_goes_before_those_of_a_newer_one(finished, make, monkeypatch):
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": 9.0})
    train("blip", make("newer", name="newer"))
    resume(make, output="newer", resume=str(find(finished, 2))).lock.abandon()
    assert resume(make, output="newer").run.plan.first_step == 2


def test_a_checkpoint_from_elsewhere_brings_its_best_and_its_log_along(finished, make, tmp_path):
    summary = train("blip", make("elsewhere", resume=str(finished / "last"), load_best_at_end=True))
    there = tmp_path / "elsewhere"
    assert summary["best_step"] == 2
    assert read_log(there) == read_log(finished)
    assert (there / "best").resolve().name == find(finished, 2).name
    assert len(list_checkpoints(there)) == 2
    weights = (there / "adapter_model.safetensors").read_bytes()
    assert weights == (finished / "best" / "adapter_model.safetensors").read_bytes()


def test_a_log_that_a_power_cut_spoiled_is_cut_not_choked_on(finished, make):
    lines = (finished / "log.jsonl").read_bytes().splitlines(keepends=True)
    (finished / "log.jsonl").write_bytes(lines[0] + b"\0\0\0\xff\n[]\n" + b"".join(lines[1:]))
    train("blip", make(resume="auto"))
    assert len(read_log(finished)) == len(lines)


def test_a_run_that_had_stopped_early_goes_on_with_more_patience(make, monkeypatch):
    losses = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": next(losses)})
    assert train("blip", make(early_stopping_patience=1))["stopped_early"]
    summary = train("blip", make(early_stopping_patience=9, resume="auto"))
    assert not summary["stopped_early"] and summary["global_step"] == 3


def test_another_learning_rate_that_is_insisted_on_is_used(finished, make):
    settings = {"learning_rate": 0.5, "epochs": 2, "scheduler": "constant"}
    run = resume(make, resume_anyway=True, **settings).run
    assert run.optimizer.param_groups[0]["lr"] == run.lr_scheduler.get_last_lr()[0] == 0.5


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_every_schedule_is_stretched_over_more_epochs_at_once(make, falling, capsys, scheduler):
    with falling():
        train("blip", make(scheduler=scheduler))
    run = resume(make, scheduler=scheduler, epochs=2).run
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(5e-4)
    assert "the learning rate along the new schedule: 0.0005 where the old one stood at 0" in (
        capsys.readouterr().err
    )


def test_the_base_is_known_by_what_is_in_it_not_by_its_place(finished, make, base, tmp_path):
    options = make(resume="auto")
    options = replace(options, model_id=str(shutil.copytree(base, tmp_path / "moved")))
    assert prepare_run(options, get_family("blip")).run.plan.first_step == 3
    weights = bytearray((tmp_path / "moved" / "model.safetensors").read_bytes())
    weights[-100_000] ^= 1
    (tmp_path / "moved" / "model.safetensors").write_bytes(weights)
    with pytest.raises(UsageError, match="base_model's content was"):
        prepare_run(options, get_family("blip"))


def test_where_links_cannot_be_a_file_names_the_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "step-1").mkdir()

    def refuse(*arguments, **settings):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)
    point(tmp_path, "last", tmp_path / "step-1")
    assert (tmp_path / "last").read_text() == "step-1"
    assert follow_pointer(tmp_path / "last") == tmp_path / "step-1"
    monkeypatch.undo()
    point(tmp_path, "last", tmp_path / "step-1")
    assert (tmp_path / "last").is_symlink() and follow_pointer(tmp_path / "last") == tmp_path / "step-1"


def test_the_manifest_does_not_mind_a_note_beside_the_files(finished, make):
    (find(finished, 3) / "note.txt").write_text("the good one")
    assert resume(make).run.plan.first_step == 3
    assert json.loads((find(finished, 3) / "manifest.json").read_text())

"""Going on from a checkpoint: with the same run only, by signal or by choice."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from caption_train.adapters import record
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.system.files import hash_file
from caption_train.system.lock import OutputLock
from caption_train.training.checkpoints import find
from caption_train.training.loop import Trainer
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer
from tests.fixtures.forked import start, start_ranks
from tests.fixtures.runs import assert_same_run, make_options, prepare_run, read_log, train


@pytest.fixture(scope="module")
def finished(base, pairs, tmp_path_factory):
    """A run of one epoch, three steps."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train("blip", make_options("blip", base, pairs, folder, epochs=1, batch_size=4, save_every_n_steps=1))
    return folder


@pytest.fixture
def resume(base, pairs, finished, tmp_path):
    def resume(prepare_folder=lambda folder: None, **changes) -> Trainer:
        shutil.copytree(finished, tmp_path / "out", symlinks=True)
        prepare_folder(tmp_path / "out")
        settings = {"epochs": 1, "batch_size": 4, "save_every_n_steps": 1, "resume": "auto", **changes}
        dataset_dir = settings.pop("dataset_dir", pairs)
        options = make_options("blip", base, dataset_dir, tmp_path / "out", **settings)
        return prepare_run(options, get_family("blip"))

    return resume


def test_rates_of_parts_may_change_if_it_is_insisted_on_but_not_which_parts_have_one(make):
    train("blip", make(epochs=1, part_learning_rates=["vision=1e-4", "language=2e-4"]))
    train("blip", make(epochs=1, part_learning_rates=["language=0.0002", "vision=0.0001"], resume="auto"))
    changed = make(epochs=2, part_learning_rates=["vision=3e-4", "language=2e-4"], resume="auto")
    with pytest.raises(UsageError, match=r"--part_learning_rates was \['language=0.0002', 'vision=0.0001'\]"):
        train("blip", changed)
    trainer = prepare_run(replace(changed, resume_anyway=True, scheduler="constant"), get_family("blip"))
    assert sorted(trainer.run.lr_scheduler.get_last_lr()) == [2e-4, 3e-4, 1e-3]
    trainer.train()
    with pytest.raises(UsageError, match=r"the parts of --part_learning_rates was \['language', 'vision'\]"):
        train("blip", make(part_learning_rates=["vision=1e-4"], resume="auto", resume_anyway=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.5}, "--learning_rate was 0.001, is 0.5"),
        ({"rank": 8}, "--rank was 4, is 8"),
        ({"target_modules": ["mlp.fc1"]}, "--target_modules was"),
        ({"batch_size": 2}, "--batch_size was 4, is 2"),
        ({"optimizer_name": "Flora"}, "--optimizer_name was 'AdamW', is 'Flora'"),
    ],
)
def test_another_setting_is_refused_by_name(resume, changes, words):
    with pytest.raises(UsageError) as error:
        resume(**changes)
    assert words in str(error.value) and "--resume_anyway" in str(error.value)


def test_a_base_that_changed_on_the_hub_is_refused_and_its_old_commit_goes_on(
    base, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache, commits = tmp_path / "hub" / "models--our--base", ("a" * 40, "b" * 40)
    (cache / "refs").mkdir(parents=True)
    for commit in commits:
        shutil.copytree(base, cache / "snapshots" / commit)

    def run(commit, epochs, **changes):
        (cache / "refs" / "main").write_text(commit)
        return train(
            "blip", make_options("blip", "our/base", pairs, tmp_path / "out", epochs=epochs, **changes)
        )

    run(commits[0], 1)
    with pytest.raises(UsageError, match=rf"commit of our/base was {commits[0]}, .*--revision {commits[0]}"):
        run(commits[1], 2, resume="auto")
    assert run(commits[1], 2, resume="auto", revision=commits[0])["global_step"] == 10


@pytest.mark.parametrize(
    "changes",
    [{"train_method": "full"}, {"rank": 8}, {"optimizer_name": "Flora"}, {"target_modules": ["fc1"]}],
)
def test_what_nothing_saved_would_fit_is_refused_though_it_is_insisted_on(resume, changes):
    (name,) = changes
    with pytest.raises(
        UsageError, match=f"what was saved does not fit, --resume_anyway or not: --{name} was "
    ):
        resume(resume_anyway=True, **changes)


def test_a_batch_size_is_adopted_only_for_the_same_effective_batch(resume, tmp_path):
    options = resume(auto_batch_size=True, batch_size=1, gradient_accumulation_steps=4).run.options
    assert (options.batch_size, options.gradient_accumulation_steps) == (4, 1)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UsageError, match="--batch_size was 4, is 8"):
        resume(auto_batch_size=True, batch_size=8)


def test_other_data_is_refused_unless_it_is_insisted_on(resume, pairs, tmp_path, capsys):
    other = shutil.copytree(pairs, tmp_path / "other")
    (other / "00.txt").write_text("something else")
    with pytest.raises(UsageError, match="dataset's fingerprint was"):
        resume(dataset_dir=other)
    shutil.rmtree(tmp_path / "out")
    resume(dataset_dir=other, resume_anyway=True)
    assert "--resume_anyway: dataset's fingerprint was" in capsys.readouterr().err


def test_the_same_data_in_another_place_is_the_same(resume, pairs, tmp_path):
    assert resume(dataset_dir=shutil.copytree(pairs, tmp_path / "moved")).run.plan.first_step == 3


def test_other_versions_are_said_not_refused(resume, monkeypatch, capsys):
    monkeypatch.setattr(record, "__version__", "99")
    resume()
    assert "caption-train was" in capsys.readouterr().err


def test_a_run_that_starts_anew_beside_another_says_so(resume, finished, capsys):
    assert resume(resume=None).run.plan.first_step == 0
    assert f"{(finished / 'last').resolve().name} of an earlier run is there" in capsys.readouterr().err


def test_a_finished_run_has_nothing_left_to_do(resume, finished):
    again, before = resume().train(), json.loads((finished / "summary.json").read_text())
    # What this process has held at most is all that may have changed.
    assert again | {"peak_memory_bytes": 0} == before | {"peak_memory_bytes": 0}


def test_more_epochs_go_on_along_the_longer_schedule(resume, capsys):
    trainer = resume(epochs=3)
    words = capsys.readouterr().err
    assert "--epochs 1 → 3: training goes on from step 3 to 9 (it was 3)" in words
    schedule = make_lr_scheduler(
        trainer.run.options, make_optimizer(trainer.run.options, trainer.run.model), 9
    )
    for _ in range(3):
        schedule.step()
    assert trainer.run.lr_scheduler.get_last_lr() == schedule.get_last_lr()
    trainer.train()
    assert [line["step"] for line in read_log(trainer.run.options.output_dir)] == list(range(1, 10))


def test_a_module_that_dies_is_found_after_an_early_resume_too(resume):
    trainer = resume(epochs=2)
    layer = trainer.run.model.base_model.model.vision_model.encoder.layers[1].mlp.fc1
    layer.register_forward_hook(lambda module, inputs, output: output.detach() + 0 * inputs[0].sum())
    with pytest.raises(CaptionTrainError, match=r"get no gradient.*layers\.1\.mlp\.fc1"):
        trainer.train()


def test_fewer_epochs_than_are_done_are_refused(base, pairs, tmp_path):
    def make(epochs: int, **changes):
        return make_options("blip", base, pairs, tmp_path / "out", epochs=epochs, batch_size=5, **changes)

    train("blip", make(2))
    with pytest.raises(UsageError, match=r"--epochs 1 ends at step 2, .* is at step 4"):
        train("blip", make(1, resume="auto"))


def damage_latest(folder: Path) -> None:
    (find.find_latest(folder)[0] / "state" / "optimizer.pt").write_bytes(b"")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(resume, capsys):
    trainer = resume(prepare_folder=damage_latest)
    assert trainer.run.plan.first_step == 2
    assert "optimizer.pt is not as it was written; passed over" in capsys.readouterr().err


def test_a_schedule_that_is_ahead_of_the_run_is_refused_before_training(resume, finished, tmp_path):
    def forget_step(folder: Path) -> None:
        for checkpoint in folder.glob("*-0*"):
            path = checkpoint / "state" / "progress.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": 0}))
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            manifest["state/progress.json"] = hash_file(path)
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    checkpoint = tmp_path / "out" / find.find_latest(finished)[0].name
    with pytest.raises(
        CaptionTrainError, match=r"schedule does not fit.*stands at step 3, the run at step 0"
    ):
        resume(forget_step, resume=str(checkpoint), resume_anyway=True)


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(make, tmp_path):
    log = tmp_path / "log"
    update = Trainer.update

    def work() -> None:
        def update_and_signal(trainer, micro_batches):
            if trainer.run.progress.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(trainer, micro_batches)

        Trainer.update = update_and_signal
        train("blip", make())

    assert start(work, log).wait() == 128 + signal.SIGTERM
    words = log.read_text()
    assert "SIGTERM: saved to" in words and "--resume auto" in words and "Traceback" not in words
    assert (tmp_path / "out" / "last").resolve().name == "step-000002-interrupted"
    train("blip", make("whole"))
    train("blip", make(resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_two_processes_stop_at_the_same_step_when_one_is_told_to(make, tmp_path):
    log = tmp_path / "log"

    def work() -> None:
        def signal_one(trainer, micro_batches):
            if trainer.run.accelerator.process_index == 1 and trainer.run.progress.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return update(trainer, micro_batches)

        update, Trainer.update = Trainer.update, signal_one
        train("blip", make())

    assert [rank.wait() for rank in start_ranks(2, work, log)] == [130, 130], log.read_text()
    assert log.read_text().count("SIGINT: saved to") == 1


def test_processes_that_disagree_stop_at_the_start(make, tmp_path):
    log = tmp_path / "log"

    def work() -> None:
        rate = 0.1 if os.environ["RANK"] == "1" else 0.2
        train("blip", make(learning_rate=rate))

    assert [rank.wait() for rank in start_ranks(2, work, log)] == [2, 2], log.read_text()
    assert "learning_rate is 0.1 in process 1, 0.2 in process 0" in log.read_text()


def test_a_second_run_into_the_folder_is_refused(make, tmp_path):
    log, holder = tmp_path / "log", OutputLock(tmp_path / "out")
    (tmp_path / "out").mkdir()
    holder.acquire()
    assert start(lambda: train("blip", make()), log).wait() == 1
    holder.release()
    assert f"another run, process {os.getpid()}" in log.read_text()

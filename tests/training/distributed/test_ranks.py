"""Two processes of a run that start from different facts, or of which only one fails."""

import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from caption_train.adapters import record
from caption_train.cli import commands
from caption_train.cli.commands import train_main
from caption_train.data.columns.table import Pairs
from caption_train.data.images import ImageError
from caption_train.system.console import count_things
from caption_train.training import batch_size
from caption_train.training.loop import Trainer
from caption_train.training.run import batches, data
from tests.fixtures.forked import start_ranks
from tests.fixtures.runs import read_log, write_pairs


@pytest.fixture
def run_script(base, tmp_path):
    """`run_script(pairs, …)` runs the script on two ranks; returns their exit codes and what they said."""

    def run_script(pairs, *flags, device=("--device", "cpu"), on_rank_1=int) -> tuple[list[int], str]:
        argv = [pairs, tmp_path / "out", "--model_id", base, *device, *flags]
        argv += ["--batch_size", "2", "--epochs", "2", "--learning_rate", "1e-3", "--rank", "4"]

        def work() -> None:
            if os.environ["RANK"] == "1":
                on_rank_1()
            sys.exit(train_main("blip", [*map(str, argv)]))

        codes = [rank.wait() for rank in start_ranks(2, work, tmp_path / "log")]
        words = (tmp_path / "log").read_text()
        assert "Traceback" not in words, words
        return codes, words

    return run_script


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs", 10)


def test_several_processes_print_one_plan(run_script, pairs):
    codes, words = run_script(pairs, "--plan")
    assert codes == [0, 0] and words.count("memory on cpu") == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU, which they would use")
def test_processes_without_a_gpu_are_one_run(run_script, pairs):
    codes, words = run_script(pairs, device=())
    assert codes == [0, 0] and words.count("2 images × 1 micro-batch × 2") == 1


def in_step(count: int, act) -> None:
    """Have this process act when it comes to its step `count`."""
    update = Trainer.update

    def update_or_act(trainer, micro_batches):
        if trainer.run.progress.global_step == count:
            act()
        return update(trainer, micro_batches)

    Trainer.update = update_or_act


def test_a_process_that_is_killed_ends_the_other_with_one_line(run_script, pairs):
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    codes, words = run_script(pairs, on_rank_1=lambda: in_step(4, kill))
    assert codes == [1, -signal.SIGKILL]
    (line,) = [line for line in words.splitlines() if "another process of this run has ended" in line]
    assert "the last good checkpoint is" in line and "epoch-0001" in line


def test_a_process_that_hangs_ends_the_other_within_the_limit(run_script, pairs, tmp_path):
    def hang() -> None:
        # The other one ends after it has said so: hanging on for longer would show nothing more.
        while "has not answered for" not in (tmp_path / "log").read_text():
            time.sleep(0.1)
        os._exit(9)

    codes, words = run_script(pairs, "--rank_timeout", "4", on_rank_1=lambda: in_step(4, hang))
    assert codes == [1, 9]
    (line,) = [line for line in words.splitlines() if "has not answered for --rank_timeout 4 seconds" in line]
    assert "the last good checkpoint is" in line and "epoch-0001" in line


def test_what_one_process_alone_runs_out_of_is_told(run_script, pairs):
    def fail() -> None:
        raise MemoryError

    codes, words = run_script(pairs, on_rank_1=lambda: in_step(4, fail))
    assert codes == [1, 1]
    assert "process 1: out of memory with --batch_size 2" in words
    assert "another process of this run has ended" in words


def test_a_sharded_step_that_does_not_fit_in_one_process_is_told(run_script, pairs, monkeypatch):
    """The other one is in the middle of its forward pass then, and cannot be asked."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    codes, words = run_script(pairs, on_rank_1=lambda: setattr(batch_size, "_try_step", lambda *_: False))
    assert codes == [1, 1] and "process 1: out of memory with --batch_size 2" in words
    assert "use --gradient_checkpointing" in words, words
    assert "--auto_batch_size" not in words and "--quantize" not in words, "what it refuses helps nobody"


def test_a_machine_with_other_versions_is_named(run_script, pairs):
    def change() -> None:
        record.__version__ = "99"

    codes, words = run_script(pairs, on_rank_1=change)
    assert codes == [2, 2] and "caption-train is '99' in process 1" in words


def test_processes_told_of_different_folders_are_refused_by_flag(run_script, pairs, tmp_path):
    other = write_pairs(tmp_path / "other", 10, seed=1)

    def look_elsewhere() -> None:
        read = commands.parse_options

        def parse(options_class, argv, **keywords):
            return read(options_class, [str(other), *argv[1:]], **keywords)

        commands.parse_options = parse

    codes, words = run_script(pairs, on_rank_1=look_elsewhere)
    assert codes == [2, 2]
    assert f"dataset_dir is '{other}' in process 1, '{pairs}' in process 0" in words


@pytest.mark.parametrize("change", ["caption", "image", "file"])
def test_a_machine_whose_folder_holds_other_data_is_named(change, run_script, pairs):
    def change_own(found):
        row, *rest = found.train
        if change == "caption":
            rest.insert(0, replace(row, caption="something else"))
        elif change == "image":
            rest.insert(0, replace(row, image=rest[0].image))
        train = Pairs.of(rest)
        return replace(found, train=train, validation=train[:0])

    def see_otherwise() -> None:
        read = data.read_pairs
        data.read_pairs = lambda options: change_own(read(options))

    codes, words = run_script(pairs, on_rank_1=see_otherwise)
    assert codes == [2, 2]
    assert f"{pairs / '00.png'} with its caption is " in words and "in process 1" in words


def test_a_machine_that_lacks_the_checkpoint_is_named(run_script, pairs, tmp_path):
    assert run_script(pairs)[0] == [0, 0]

    def lose() -> None:
        from caption_train.training import prepare

        prepare.find_resume_point = lambda options: (None, [])

    codes, words = run_script(pairs, "--resume", "auto", on_rank_1=lose)
    assert codes == [2, 2] and "the checkpoint to go on from is None in process 1, 'epoch-0002" in words


def test_a_machine_that_lacks_the_base_is_named(run_script, pairs):
    def lose() -> None:
        from caption_train.errors import CaptionTrainError
        from caption_train.training import prepare

        def fail(*arguments):
            raise CaptionTrainError("--model_id base: there is no such folder")

        prepare.load_trainable = fail

    codes, words = run_script(pairs, on_rank_1=lose)
    assert codes == [1, 1] and words.count("process 1: --model_id base: there is no such folder") == 1


def test_an_image_that_one_process_cannot_read_is_left_out_by_it(run_script, pairs, tmp_path):
    def lose_sight() -> None:
        def open_or_fail(path):
            raise ImageError(f"{path}: gone")

        in_step(1, lambda: setattr(batches, "open_image", open_or_fail))

    codes, words = run_script(pairs, on_rank_1=lose_sight)
    assert codes == [0, 0]
    assert words.count(": gone") > 0
    assert len(read_log(tmp_path / "out")) == 6


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_images_than_processes_train_and_validate(count, run_script, tmp_path):
    few = write_pairs(tmp_path / "few", count)
    one = write_pairs(tmp_path / "one", 1, seed=1)
    flags = ["--validation_dir", one, "--metrics", "exact_match", "--sample_every_n_epochs", "1"]
    codes, words = run_script(few, *flags)
    assert codes == [0, 0]
    assert f"{count_things(count, 'image/caption pair')}, effective" in words
    assert [line["step"] for line in read_log(tmp_path / "out") if "loss" in line] == [1, 2]

"""What a run says of losses that jump."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from caption_train.system.memory import HeapTrimmer
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.loop import Trainer
from caption_train.training.monitor.health import WARM_UP, Health
from caption_train.training.run.batches import MicroBatch


@pytest.fixture
def health():
    run = SimpleNamespace(
        progress=Progress(global_step=1),
        accelerator=Accelerator(cpu=True),
        options=SimpleNamespace(max_bad_steps=3, output_dir=None),
        model=torch.nn.Module(),
    )
    return Health(run)


def feed(health: Health, losses: list[float]) -> None:
    for index, loss in enumerate(losses):
        health.note_good(loss, [MicroBatch({}, [f"{index}.png"], 1, [])])
        health.run.progress.global_step += 1


ORDINARY = [2 + 0.1 * (-1) ** step - 0.01 * step for step in range(3 * WARM_UP)]


def test_an_ordinary_run_has_no_spikes(health, capsys):
    feed(health, ORDINARY)
    assert capsys.readouterr().err == ""


def test_a_loss_that_jumps_is_said_with_its_files(health, capsys):
    feed(health, [*ORDINARY, 9.0])
    said = capsys.readouterr().err
    assert "loss 9.0000 jumped" in said and f"{len(ORDINARY)}.png" in said


def test_the_first_steps_are_not_judged(health, capsys):
    feed(health, [2.0, 9.0, 2.0])
    assert capsys.readouterr().err == ""


def test_a_skipped_step_is_said_and_an_overflow_of_fp16_is_no_bad_step(health, capsys):
    batch = [MicroBatch({}, ["a.png"], 1, [])]
    for _ in range(5):
        health.note_bad(1.0, batch, overflow=True)
    assert health.run.progress.bad_steps == 0 and capsys.readouterr().err == ""
    health.note_bad(float("nan"), batch, overflow=False)
    assert "step 2 skipped" in capsys.readouterr().err
    feed(health, [1.0])
    assert health.run.progress.bad_steps == 0 and health.run.progress.skipped_steps == 6


def _stub(run, health: Health) -> SimpleNamespace:
    """Return what of a Trainer takes a step."""
    return SimpleNamespace(run=run, health=health, heap=HeapTrimmer(False))


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_skipped_moves_nothing_under_a_loss_scaler(health, loss, gradient):
    weight, scaler = torch.nn.Parameter(torch.ones(3)), torch.amp.GradScaler("cpu", init_scale=4.0)
    run = health.run
    run.accelerator = SimpleNamespace(scaler=scaler, is_main_process=True)
    run.optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight]), scaler=scaler)
    run.lr_scheduler = SimpleNamespace(step=lambda: None, get_last_lr=lambda: [1.0])
    for step, (value, slope) in enumerate([(1.0, 1.0), (loss, gradient), (1.0, 1.0)]):
        before = weight.detach().clone()
        scaler.scale(weight.new_tensor(value))
        weight.grad = torch.full_like(weight, slope)
        scaler.unscale_(run.optimizer.optimizer)
        Trainer._step(_stub(run, health), [], value, float(weight.grad.norm()))
        assert torch.equal(weight, before) == (step == 1)


@pytest.mark.parametrize(("scale", "bad"), [(2.0**15, 0), (0.5, 1)])
def test_an_overflow_is_ordinary_only_while_the_scale_has_room_to_fall(health, scale, bad):
    scaler = SimpleNamespace(get_scale=lambda: scale)
    run = health.run
    run.accelerator = SimpleNamespace(scaler=scaler, is_main_process=True)
    run.optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda: None, step_was_skipped=True)
    Trainer._step(_stub(run, health), [MicroBatch({}, ["a"], 1, [])], 1.0, math.inf)
    assert (run.progress.bad_steps, run.progress.skipped_steps) == (bad, 1)

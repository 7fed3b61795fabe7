"""The loop against plain PyTorch, and what it does when a run goes wrong."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal

import pytest
import torch

from caption_train.adapters.lora import wrap_with_lora
from caption_train.config.training import TrainOptions
from caption_train.data.dataset import read_dataset
from caption_train.data.images import open_image
from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.training.checkpoints.find import list_checkpoints
from caption_train.training.loop import Trainer
from tests.fixtures.forked import start_ranks
from tests.fixtures.runs import make_options, prepare_run, read_log, save_base, write_pairs

FAMILIES = ("blip", "florence")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 10)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: save_base(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture
def make_trainer(bases, pairs_dir, tmp_path):
    def make(family: str = "blip", **changes) -> Trainer:
        dataset_dir = changes.pop("dataset_dir", pairs_dir)
        options = make_options(family, bases[family], dataset_dir, tmp_path / "out", **changes)
        return prepare_run(options, get_family(family))

    return make


def train_plainly(options: TrainOptions, family) -> list[float]:
    """Train as one would write it in thirty lines of PyTorch, without this package's loop or accelerate."""
    pairs = read_dataset(options.dataset_dir, caption_extensions=(".txt",))
    torch.manual_seed(options.seed)
    model, processor = family.load(options.model_id)
    model = wrap_with_lora(model, options.target_modules, rank=options.rank, alpha=options.alpha, dropout=0.0)
    collate = family.make_collator(
        processor, prompt=family.facts.default_prompt, max_length=options.max_length
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    total = options.epochs * math.ceil(len(pairs) / options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total, cycle_momentum=False
    )
    model.train()
    losses = []
    for epoch in range(1, options.epochs + 1):
        order = list(range(len(pairs)))
        random.Random(f"{options.seed} {epoch}").shuffle(order)
        for start in range(0, len(order), options.batch_size):
            chosen = [pairs[index] for index in order[start : start + options.batch_size]]
            batch = collate([{"image": open_image(p.image), "caption": p.caption} for p in chosen])
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_losses_equal_plain_pytorch_bit_for_bit(family, make_trainer):
    trainer = make_trainer(family, epochs=4)
    trainer.train()
    losses = [line["loss"] for line in read_log(trainer.run.options.output_dir)]
    assert len(losses) == 20
    assert losses == train_plainly(trainer.run.options, get_family(family))
    assert losses[-1] < losses[0]


def take_one_step(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the first step's loss and gradients."""
    run, gradients = trainer.run, {}
    names = {p: name for name, p in run.model.named_parameters()}
    # The loop drops gradients after its step, and clipping is where it last looks at them.
    clip = run.accelerator.clip_grad_norm_

    def clip_and_keep(parameters, norm):
        gradients.update({names[p]: p.grad.clone() for p in parameters})
        return clip(parameters, norm)

    run.accelerator.clip_grad_norm_ = clip_and_keep
    run.model.train()
    batches = iter(run.train_dataloader)
    loss, _ = trainer.update([next(batches) for _ in run.plan.micro_batches(0)])
    return loss, gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_does_not_depend_on_how_a_batch_is_cut(family, make_trainer):
    loss, gradients = take_one_step(make_trainer(family, batch_size=4))
    for batch_size, steps in ((1, 4), (2, 2)):
        trainer = make_trainer(family, batch_size=batch_size, gradient_accumulation_steps=steps)
        cut_loss, cut = take_one_step(trainer)
        assert cut_loss == pytest.approx(loss, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_filler_micro_batch_adds_exactly_nothing(make_trainer):
    trainer = make_trainer()
    filler = trainer.run.train_dataloader.collate_fn([])
    assert filler.label_tokens == 0
    micro_batch = next(iter(trainer.run.train_dataloader))
    losses = [trainer.update([micro_batch])[0]]
    other = make_trainer()
    losses.append(other.update([micro_batch, filler])[0])
    assert losses[0] == losses[1]
    for p, q in zip(trainer.parameters, other.parameters, strict=True):
        assert torch.equal(p, q)


def test_blocks_that_stochastic_depth_skips_at_first_are_not_dead(pairs_dir, tmp_path, monkeypatch):
    base = save_base("florence", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["vision_config"]["drop_path_rate"] = 0.7
    (base / "config.json").write_text(json.dumps(config))
    options = make_options("florence", base, pairs_dir, tmp_path / "out", batch_size=1, epochs=2)
    prepare_run(options, get_family("florence")).train()
    assert len(read_log(tmp_path / "out")) == 20
    never = make_options("florence", base, pairs_dir, tmp_path / "other", batch_size=1, epochs=3)
    trainer = prepare_run(never, get_family("florence"))
    monkeypatch.setattr(torch, "rand", lambda *_, **keywords: torch.zeros(1, 1, 1, **keywords))
    with pytest.raises(CaptionTrainError, match=r"LoRA modules get no gradient.*vision_tower"):
        trainer.train()


def test_a_module_that_gets_no_gradient_stops_the_run_by_name(make_trainer):
    trainer = make_trainer()
    layer = trainer.run.model.base_model.model.vision_model.encoder.layers[1].mlp.fc1
    layer.register_forward_hook(lambda module, inputs, output: output.detach() + 0 * inputs[0].sum())
    with pytest.raises(
        CaptionTrainError, match=r"--target_modules: .*vision_model\.encoder\.layers\.1\.mlp\.fc1"
    ):
        trainer.train()


def poison(trainer: Trainer, calls: set[int]) -> None:
    """Make the loss of these forward passes, counted from 0, not a number."""
    count = iter(range(10**6))

    def spoil(module, inputs, output):
        if next(count) in calls:
            output.loss = output.loss * math.nan
        return output

    trainer.run.model.register_forward_hook(spoil)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(make_trainer):
    trainer = make_trainer(epochs=1)
    poison(trainer, {2})
    rates = []
    trainer.log.write = lambda step, epoch, values: rates.append(values["learning_rate"])
    summary = trainer.train()
    assert summary["skipped_steps"] == 1
    assert rates[2] == rates[3], "a step not taken must not advance the schedule"
    assert all(p.isfinite().all() for p in trainer.parameters)


def test_too_many_bad_steps_stop_the_run_naming_files_and_checkpoint(make_trainer):
    trainer = make_trainer(max_bad_steps=2, save_every_n_steps=1)
    poison(trainer, {3, 4})
    with pytest.raises(CaptionTrainError) as error:
        trainer.train()
    message = str(error.value)
    assert "--max_bad_steps" in message and ".png" in message and "step-000004" in message
    assert "\n" not in message


def test_a_worker_that_dies_ends_the_run_in_one_line(make_trainer, tmp_path):
    trainer = make_trainer(num_workers=1, epochs=40)
    update = trainer.update

    def kill_worker(micro_batches):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        return update(micro_batches)

    trainer.update = kill_worker
    with pytest.raises(CaptionTrainError, match="--num_workers 1: a process that reads images died"):
        trainer.train()


def test_an_image_that_breaks_during_training_is_left_out_and_counted(make_trainer, pairs_dir, tmp_path):
    own = shutil.copytree(pairs_dir, tmp_path / "own")
    trainer = make_trainer(dataset_dir=own, epochs=2)
    (own / "03.png").write_bytes(b"")
    (own / "04.png").unlink()
    summary = trainer.train()
    assert [line.split(": ")[0].rpartition("/")[2] for line in sorted(summary["skipped_files"])] == [
        "03.png",
        "04.png",
    ]
    assert summary["images"] == 16


def test_what_another_process_leaves_out_is_counted_too(make_trainer, pairs_dir, tmp_path):
    own, log = shutil.copytree(pairs_dir, tmp_path / "own"), tmp_path / "log"

    def work() -> None:
        trainer = make_trainer(dataset_dir=own, epochs=1, batch_size=5)
        (own / f"0{os.environ['RANK']}.png").unlink()
        trainer.train()

    assert [rank.wait() for rank in start_ranks(2, work, log)] == [0, 0], log.read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["skipped_files"]) == 2 and summary["images"] == 8
    assert log.read_text().count("skipped ") == 2


def test_a_step_without_an_image_left_is_skipped_and_many_end_the_run(make_trainer, pairs_dir, tmp_path):
    own = shutil.copytree(pairs_dir, tmp_path / "own")
    trainer = make_trainer(dataset_dir=own, max_bad_steps=3)
    shutil.rmtree(own)
    with pytest.raises(
        CaptionTrainError, match=r"--max_bad_steps: 3 steps .* no image could be read; nothing"
    ):
        trainer.train()
    assert [line["loss"] for line in read_log(tmp_path / "out")] == [None, None]


def test_the_summary_is_strict_json_after_a_bad_last_step(make_trainer, tmp_path):
    trainer = make_trainer(epochs=1, save_every_n_steps=1)
    poison(trainer, {0, 4})
    trainer.train()

    def refuse(name):
        raise ValueError(name)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=refuse)
    assert math.isfinite(summary["loss"]) and summary["skipped_steps"] == 2
    assert summary["wall_seconds"] >= summary["train_seconds"]
    assert (tmp_path / "out" / "step-000001").is_dir(), "no loss yet to name it after"


def test_a_name_begins_the_names_of_checkpoints(make_trainer):
    trainer = make_trainer(name="cats", epochs=1)
    trainer.train()
    output_dir = trainer.run.options.output_dir
    assert [p.name[:15] for p in list_checkpoints(output_dir)] == ["cats-epoch-0001"]
    assert (output_dir / "last").resolve().name.startswith("cats-")

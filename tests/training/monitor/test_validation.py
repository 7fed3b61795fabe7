"""Validation: what it measures, and what follows from it."""

import json
import math
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from caption_train.data.images import open_image
from caption_train.data.rows import write_metadata
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.families.labels import count_label_tokens
from caption_train.training.monitor.validation import Evaluator
from tests.fixtures.forked import start_ranks
from tests.fixtures.runs import make_options, prepare_run, read_log, train, write_pairs

PAIRS = 8


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("held out"), 5, seed=1)


@pytest.fixture
def make(base, pairs, held_out, tmp_path):
    def make(output="out", **changes):
        options = {"validation_dir": held_out, "epochs": 1, "batch_size": 4, **changes}
        return make_options("blip", base, pairs, tmp_path / output, **options)

    return make


def read_evaluations(output_dir) -> list[dict]:
    return [line for line in read_log(output_dir) if "eval_loss" in line]


def test_the_loss_is_per_token_and_without_dropout(make):
    trainer = prepare_run(make(dropout=0.5), get_family("blip"))
    evaluator, run = trainer.evaluator, trainer.run
    run.model.train()
    before = torch.get_rng_state()
    values = evaluator.evaluate()
    assert run.model.training and torch.equal(torch.get_rng_state(), before)
    run.model.eval()
    total = tokens = 0
    for pair in evaluator.pairs:
        batch = evaluator.collate_fn([{"image": open_image(pair.image), "caption": pair.caption}])
        # BLIP's first label is the token it starts from, which no loss is due on.
        count = count_label_tokens(batch["labels"])
        total, tokens = total + run.model(**batch).loss.item() * count, tokens + count
    assert values == {"loss": pytest.approx(total / tokens, rel=1e-2)}


def test_what_reads_images_can_be_sent_to_a_new_process(make):
    """As Windows and macOS start workers."""
    loader = prepare_run(make(num_workers=1), get_family("blip")).evaluator._loader
    sent = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
    dataset, collate_fn, _ = pickle.loads(pickle.dumps(sent))
    keys = next(iter(loader.batch_sampler))
    one, other = (
        collate([images[key] for key in keys]) for images, collate in (sent[:2], (dataset, collate_fn))
    )
    assert one.files == other.files and len(one.files) == len(keys)
    assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])


def test_validation_happens_every_epoch_and_the_best_is_kept_and_pointed_at(make, monkeypatch):
    losses = iter([0.5, 3.0, 1.0, 2.0])
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": next(losses)})
    options = make(epochs=3, load_best_at_end=True)
    summary = train("blip", options)
    out = options.output_dir
    assert [line["step"] for line in read_evaluations(out)] == [0, 2, 4, 6]
    assert summary["base_loss"] == 0.5, "what is measured before training is no candidate for the best"
    assert (summary["best_step"], summary["best_loss"]) == (4, 1.0)
    best, last = (out / "best").resolve(), (out / "last").resolve()
    assert best.name.startswith("epoch-0002") and last.name.startswith("epoch-0003")
    assert sorted(p.name for p in out.glob("epoch-*")) == [best.name, last.name]
    published = load_file(out / "adapter_model.safetensors")
    for name, weight in load_file(best / "adapter_model.safetensors").items():
        assert torch.equal(published[name], weight)


def test_a_run_stops_once_it_gets_no_better(make, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, math.nan, 0.0])
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": next(losses)})
    options = make(epochs=4, early_stopping_patience=2)
    summary = train("blip", options)
    assert summary["stopped_early"] and summary["global_step"] == 6
    assert json.loads((options.output_dir / "summary.json").read_text())["best_step"] == 2


def test_a_run_that_stopped_early_stays_stopped(make, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: {"loss": next(losses)})
    first = train("blip", make(epochs=4, early_stopping_patience=1))
    again = train("blip", make(epochs=4, early_stopping_patience=1, resume="auto"))
    assert again["stopped_early"] and again["global_step"] == first["global_step"] == 4


def test_without_an_image_left_to_validate_on_nothing_is_the_best(make, held_out, tmp_path):
    own = shutil.copytree(held_out, tmp_path / "own")
    trainer = prepare_run(make(validation_dir=own, metrics=["cider"]), get_family("blip"))
    shutil.rmtree(own)
    summary = trainer.train()
    assert summary["best_step"] is None and len(summary["skipped_files"]) == 5
    json.loads((trainer.run.options.output_dir / "summary.json").read_text(), parse_constant=pytest.fail)


def test_samples_are_of_validation_images_before_the_first_step_too(make, capsys):
    train("blip", make(sample_every_n_epochs=1))
    words = capsys.readouterr().err
    for title in ("samples at step 0", "samples at step 2"):
        shown = words.partition(title)[2].partition("└")[0]
        assert [line for line in shown.splitlines() if ".png" in line] and "trained on" not in shown


def test_samples_of_images_that_are_trained_on_are_called_so(make, capsys):
    train("blip", make(validation_dir=None, sample_every_n_epochs=1))
    assert "samples at step 0 (images that are trained on" in capsys.readouterr().err


def test_captions_are_scored_and_the_score_can_tell_the_best(make):
    options = make(metrics=["cider", "exact_match"], metric_for_best="cider", metric_samples=3)
    summary = train("blip", options)
    base, evaluation = read_evaluations(options.output_dir)
    assert base.keys() == evaluation.keys()
    assert {"eval_loss", "eval_cider", "eval_exact_match"} <= evaluation.keys()
    assert summary["best_cider"] == evaluation["eval_cider"]


def test_two_processes_measure_what_one_does(make, tmp_path):
    settings = {"metrics": ["cider", "bleu", "rouge_l"]}
    log = tmp_path / "log"
    ranks = start_ranks(2, lambda: train("blip", make("two", **settings, batch_size=2)), log)
    assert [rank.wait() for rank in ranks] == [0, 0], log.read_text()
    train("blip", make("one", **settings))
    one, two = (read_evaluations(tmp_path / count) for count in ("one", "two"))
    assert len(one) == len(two) == 2
    assert [values == pytest.approx(other, abs=1e-4) for values, other in zip(one, two, strict=True)] == [
        True
    ] * 2


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_training(make, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(CaptionTrainError, match=r"0\.1 MB free, one checkpoint takes more than 0\.5 MB"):
        prepare_run(make(), get_family("blip"))


def test_asking_for_the_best_without_validation_images_is_refused(make):
    with pytest.raises(UsageError, match="--load_best_at_end needs validation images"):
        prepare_run(make(validation_dir=None, load_best_at_end=True), get_family("blip"))


def test_options_that_validation_cannot_follow_are_refused(make):
    problems = make(validation_split=0.1, metrics=["spice"], metric_for_best="cider").check()
    assert len(problems) == 3
    assert "--metrics spice" in problems[0]
    assert "--validation_split and --validation_dir" in problems[1]
    assert "--metric_for_best cider" in problems[2]


@pytest.fixture(scope="module")
def categories(tmp_path_factory):
    """Eight folders of six images each, every row three times, as Kohya's repeats make them."""
    folder, rows = tmp_path_factory.mktemp("categories"), []
    for number in range(8):
        write_pairs(folder / f"c{number}", 6, seed=10 + number)
        names = [f"c{number}/{image:02d}.png" for image in range(6)]
        rows += [{"file_name": name, "text": f"a {name}", "split": "validation"} for name in names] * 3
    rows += [{"file_name": "c0/00.png", "text": "a thing to train on"}]
    write_metadata(folder / "metadata.jsonl", rows)
    return folder


def test_metrics_and_previews_look_into_every_folder_and_at_each_image_once(make, categories):
    options = make(validation_dir=None, metrics=["cider"], metric_samples=20, sample_every_n_epochs=1)
    trainer = prepare_run(replace(options, dataset_dir=categories), get_family("blip"))
    assert len(trainer.evaluator.pairs) == 48
    images = [question.image for question in trainer.evaluator.questions]
    assert len(set(images)) == 20 and len({image.parent for image in images}) >= 6
    shown = [pair.image for pair, _ in trainer.sampler.images]
    assert shown == images[:4] and len({image.parent for image in shown}) > 1


def test_the_images_of_the_metrics_depend_on_bytes_and_seed_not_on_names(make, categories, tmp_path):
    renamed = shutil.copytree(categories, tmp_path / "renamed")
    for number in range(8):
        (renamed / f"c{number}").rename(renamed / f"d{7 - number}")
    text = (renamed / "metadata.jsonl").read_text()
    for number in range(8):
        text = text.replace(f'"c{number}/', f'"d{7 - number}/')
    (renamed / "metadata.jsonl").write_text(text)

    def look_at(folder, **changes) -> list[bytes]:
        options = make(**{"validation_dir": None, "metrics": ["bleu"], "metric_samples": 5, **changes})
        trainer = prepare_run(replace(options, dataset_dir=folder), get_family("blip"))
        return [question.image.read_bytes() for question in trainer.evaluator.questions]

    assert look_at(categories) == look_at(renamed)
    assert look_at(categories) != look_at(categories, seed=7)
    everything = look_at(categories, metric_samples=48)
    assert len(set(everything)) == 48 and sorted(everything) == sorted(look_at(renamed, metric_samples=99))


def test_copies_of_an_image_are_one_image_with_all_its_captions(make, held_out, tmp_path):
    own = shutil.copytree(held_out, tmp_path / "own")
    shutil.copy(own / "00.png", own / "copy.png")
    (own / "copy.txt").write_text("another caption of it")
    trainer = prepare_run(make(validation_dir=own, metrics=["cider"]), get_family("blip"))
    references = {question.image.name: question.references for question in trainer.evaluator.questions}
    assert len(references) == 5
    assert references["00.png"] == [(own / "00.txt").read_text(), "another caption of it"]

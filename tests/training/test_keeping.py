"""`--cache_features`: the vision tower runs once an image, and the run stays the run that it was."""

import errno
import functools
import os
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from caption_train.data import images
from caption_train.families import FAMILIES, get_family
from caption_train.training.monitor import validation
from tests.fixtures.runs import (
    assert_same_run,
    make_options,
    prepare_run,
    read_log,
    save_base,
    train,
    write_pairs,
)

PLAIN = {name: ["projector", "language"] for name in FAMILIES} | {"vlm": ["language"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "caption-train" / "features"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return functools.cache(lambda family: save_base(family, tmp_path_factory.mktemp(f"{family}-base")))


@pytest.fixture
def make(bases, tmp_path):
    """`make(family)`: options for six pictures, two of which are one file twice."""
    folder = write_pairs(tmp_path / "pairs", 6)
    (folder / "05.png").write_bytes((folder / "04.png").read_bytes())
    return lambda family: make_options(family, bases(family), folder, tmp_path / "plain")


@pytest.fixture
def options(make):
    return make("blip")


def kept(tmp_path, options, name="kept", **changes):
    return replace(options, output_dir=tmp_path / name, cache_features=True, **changes)


@pytest.fixture
def opened(monkeypatch):
    """The paths that were decoded after the check at the start, which reads them in its own way."""
    found = []
    real = images.open_image
    for module in ("caption_train.features.source", "caption_train.training.run.batches"):
        monkeypatch.setattr(f"{module}.open_image", lambda path: found.append(path) or real(path))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_picture_is_encoded_once_and_the_run_is_the_plain_one_bit_for_bit(
    family, make, tmp_path, opened
):
    plain = replace(make(family), batch_size=1, gradient_accumulation_steps=2)
    for name, encoded in (("kept", 5), ("again", 0)):
        trainer = prepare_run(kept(tmp_path, plain, name), get_family(family))
        trainer.train()
        assert trainer.run.keeping.encoder.computed == encoded
        # A copy may be opened before the features of its twin are kept.
        assert len(opened) in ((5, 6) if encoded else (0,))
        opened.clear()
    train(family, replace(plain, train_parts=PLAIN[family]))
    assert len(opened) == 2 * 6
    assert_same_run(tmp_path / "kept", tmp_path / "again")
    assert_same_run(tmp_path / "kept", tmp_path / "plain")


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16", "num_workers": 2}, {"train_method": "full"}])
def test_a_run_that_keeps_nothing_is_the_same_run(options, tmp_path, changes):
    """In bf16 too, because pictures are encoded one by one."""
    train("blip", kept(tmp_path, options, **changes))
    train("blip", kept(tmp_path, options, "none", cache_limit="0.0MB", **changes))
    train("blip", kept(tmp_path, options, "again", **changes))
    assert_same_run(tmp_path / "kept", tmp_path / "none")
    assert_same_run(tmp_path / "kept", tmp_path / "again")


def test_validation_metrics_and_previews_take_kept_features_too(options, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(validation, "MAX_NEW_TOKENS", 8)
    watched = {
        "validation_split": 0.4,
        "metrics": ["exact_match"],
        "sample_every_n_epochs": 1,
        "eval_every_n_epochs": 1,
    }
    train("blip", kept(tmp_path, options, **watched))
    trainer = prepare_run(kept(tmp_path, options, "again", **watched), get_family("blip"))
    opened.clear()
    trainer.train()
    assert trainer.run.keeping.encoder.computed == 0 and opened == []
    assert_same_run(tmp_path / "kept", tmp_path / "again")
    assert any("eval_exact_match" in row for row in read_log(tmp_path / "kept"))


def test_a_resumed_run_ends_as_the_one_without_a_stop(options, tmp_path):
    train("blip", kept(tmp_path, options, "whole", save_every_n_steps=2))
    trainer = prepare_run(kept(tmp_path, options, "cut", save_every_n_steps=2), get_family("blip"))

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    trainer.sampler.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    train("blip", kept(tmp_path, options, "cut", save_every_n_steps=2, resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_picture_that_changes_during_a_run_is_not_kept_as_the_old_one(options, tmp_path, cache):
    trainer = prepare_run(kept(tmp_path, options, epochs=1), get_family("blip"))
    Image.new("RGB", (40, 40), "red").save(options.dataset_dir / "00.png")
    trainer.train()
    digests = {path.name: digest for path, digest in trainer.run.keeping.source.digests.items()}
    store = trainer.run.keeping.encoder.store
    assert not store.has(digests["00.png"]) and store.has(digests["01.png"])


def test_other_weights_and_precisions_have_other_features(options, tmp_path, cache):
    train("blip", kept(tmp_path, options, epochs=1))
    train("blip", kept(tmp_path, options, "bf16", epochs=1, mixed_precision="bf16"))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("kind", ["damaged", "deleted"])
def test_features_that_another_process_removes_are_computed_again(options, tmp_path, cache, kind):
    trainer = prepare_run(kept(tmp_path, options), get_family("blip"))
    store, rows = trainer.run.keeping.encoder.store, []

    def remove(step):
        rows.append(step)
        if kind == "deleted":
            shutil.rmtree(cache, ignore_errors=True)
        for path in store.folder.rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[: 50 * (step + 1)])

    trainer.sampler.after_step = remove
    trainer.train()
    train("blip", kept(tmp_path, options, "other"))
    assert rows and trainer.run.keeping.encoder.computed > 5
    assert_same_run(tmp_path / "kept", tmp_path / "other")


def test_a_trained_tower_is_refused_in_one_line(options, tmp_path):
    problems = kept(tmp_path, options, train_parts=["vision"]).check()
    assert len(problems) == 1 and "--train_parts" in problems[0]
    assert "vision is frozen" in " ".join(
        kept(tmp_path, options, part_learning_rates=["vision=1e-5"]).check()
    )
    assert "--cache_features" in " ".join(replace(options, cache_limit="5GB").check())
    assert "no size" in " ".join(kept(tmp_path, options, cache_limit="a lot").check())


def test_the_folder_for_features_is_named_where_it_cannot_be_made(options, tmp_path, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("in the way")
    with pytest.raises(Exception, match=r"--cache_features: .*features.* cannot be made: .*XDG_CACHE_HOME"):
        prepare_run(kept(tmp_path, options), get_family("blip"))


def test_a_disk_that_refuses_is_said_in_one_line_and_the_run_goes_on(options, tmp_path, monkeypatch, capsys):
    train("blip", kept(tmp_path, options))
    said = "No space left on device: images without kept features are encoded in each epoch"
    assert said not in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    refused = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr("caption_train.features.store.open_temporary", refused)
    train("blip", kept(tmp_path, options, "refused"))
    assert_same_run(tmp_path / "kept", tmp_path / "refused")
    text = capsys.readouterr()
    assert (text.out + text.err).count(said) == 1 and refused.call_count == 1


def test_too_little_room_is_said_once(options, tmp_path, capsys):
    train("blip", kept(tmp_path, options, cache_limit="0.01MB", epochs=1))
    text = capsys.readouterr()
    lines = [line for line in (text.out + text.err).splitlines() if line.startswith("--cache_features: ")]
    assert len(lines) == 1 and "(--cache_limit), the rest is encoded in each epoch" in lines[0]


def test_the_tried_step_encodes_images_one_by_one_as_the_run_does(options, tmp_path, monkeypatch):
    """Otherwise `--auto_batch_size` would make a batch smaller that fits."""
    counts = []
    real = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: counts.append(len(x)) or real(self, x))
    prepare_run(kept(tmp_path, options, batch_size=4, auto_batch_size=True), get_family("blip"))
    assert counts and set(counts) == {1}

"""A kept native copy is what the checkpoint is, and is made again when the checkpoint changes."""

import os

import pytest
import torch

from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.families.florence.legacy import cache
from tests.fixtures.florence_legacy import needs_fixtures, read_tensors, write_checkpoint

pytestmark = needs_fixtures


@pytest.fixture
def family(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    family = get_family("florence")
    family.cache_converted = True
    return family


def find_copies(tmp_path):
    return sorted((tmp_path / "cache" / "caption-train" / "florence").iterdir())


def test_nothing_is_kept_unless_asked(tmp_path, family):
    family.cache_converted = False
    family.load(str(write_checkpoint(tmp_path / "model", read_tensors())))
    assert not (tmp_path / "cache").exists()


def test_the_second_load_converts_nothing_and_is_the_same(tmp_path, family, monkeypatch):
    tensors = {name: tensor.half() for name, tensor in read_tensors().items()}
    folder = str(write_checkpoint(tmp_path / "model", tensors))
    first, _ = family.load(folder)
    monkeypatch.setattr(cache, "load_legacy", None)
    second, processor = family.load(folder)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert second.dtype == torch.float32
    assert second.name_or_path == folder
    assert second.generation_config.no_repeat_ngram_size == 3
    assert processor.num_image_tokens == 577
    (copy,) = find_copies(tmp_path)
    assert copy.name.startswith("model-")


def test_a_changed_checkpoint_is_converted_anew(tmp_path, family):
    tensors = read_tensors()
    folder = write_checkpoint(tmp_path / "model", tensors)
    family.load(str(folder))
    tensors["image_proj_norm.bias"] += 1
    write_checkpoint(folder, tensors)
    model, _ = family.load(str(folder))
    assert torch.equal(
        model.model.multi_modal_projector.image_proj_norm.bias, tensors["image_proj_norm.bias"]
    )
    assert len(find_copies(tmp_path)) == 1


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path, family):
    tensors = read_tensors()
    weights = write_checkpoint(tmp_path / "model", tensors) / "pytorch_model.bin"
    family.load(str(weights.parent))
    old = weights.stat()
    tensors["image_proj_norm.bias"] += 1
    torch.save(tensors, weights)
    os.utime(weights, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert weights.stat().st_size == old.st_size
    model, _ = family.load(str(weights.parent))
    assert torch.equal(
        model.model.multi_modal_projector.image_proj_norm.bias, tensors["image_proj_norm.bias"]
    )


def test_two_folders_of_one_name_have_a_copy_each(tmp_path, family):
    tensors = read_tensors()
    for parent in ("a", "b"):
        folder = str(write_checkpoint(tmp_path / parent / "model", tensors))
        family.load(folder)
        assert family.load(folder)[0].name_or_path == folder
    assert len(find_copies(tmp_path)) == 2


def test_a_copy_that_another_process_made_meanwhile_is_used(tmp_path, family, monkeypatch):
    folder = str(write_checkpoint(tmp_path / "model", read_tensors()))
    convert = cache.load_legacy

    def convert_late(checkpoint, **keywords):
        monkeypatch.setattr(cache, "load_legacy", convert)
        family.load(folder)
        return convert(checkpoint, **keywords)

    monkeypatch.setattr(cache, "load_legacy", convert_late)
    model, _ = family.load(folder)
    assert model.name_or_path == folder
    (copy,) = find_copies(tmp_path)
    assert not copy.name.startswith(".")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, family):
    (tmp_path / "cache").write_text("a file, no folder")
    with pytest.raises(CaptionTrainError, match="--cache_converted"):
        family.load(str(write_checkpoint(tmp_path / "model", read_tensors())))

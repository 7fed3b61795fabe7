"""A processor made of its parts, saved as others read it, and loaded from what was saved."""

import json
import pickle
import shutil

import pytest
import torch
from PIL import Image

from caption_train.families import get_family
from caption_train.families.vlm.checkpoint import find_model_class
from caption_train.families.vlm.processor import load_processor
from tests.fixtures.vlm import KINDS

IMAGES = [Image.effect_noise(size, 90).convert("RGB") for size in ((96, 64), (64, 128))]


@pytest.fixture
def load(tiny_base):
    def run(kind, folder=None):
        base = tiny_base(f"vlm/{kind}")
        return load_processor(folder or base, *find_model_class(base, kind), kind)

    return run


def assert_same_batch(one, other):
    first, second = (processor(IMAGES, ["hi", "a longer prompt"]) for processor in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_loaded(load, tiny_base, kind, tmp_path):
    processor = load(kind)
    get_family("vlm").configure(processor, {"max_pixels": 64 * 64})
    processor.save_pretrained(tmp_path)
    if (generation := tiny_base(f"vlm/{kind}") / "generation_config.json").is_file():
        shutil.copy(generation, tmp_path)  # the model's, and saved with it
    again = load(kind, tmp_path)
    again.max_pixels, again.system_prompt = processor.max_pixels, processor.system_prompt
    assert again.chat == processor.chat
    assert_same_batch(processor, again)


def test_a_processor_goes_to_other_processes(load):
    processor = load("smolvlm")
    assert_same_batch(processor, pickle.loads(pickle.dumps(processor)))


@pytest.mark.parametrize("kind", ["llava", "idefics3", "gemma3", "paligemma"])
def test_plain_auto_processor_opens_it_where_it_needs_no_torchvision(load, kind, tmp_path):
    from transformers import AutoProcessor

    processor = load(kind)
    processor.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(plain) is type(processor.inner)
    text = processor.render("hi")
    arguments = {"text": [text], "images": [[IMAGES[0]]], "add_special_tokens": not text.startswith("<bos>")}
    assert plain(**arguments)["input_ids"] == processor.inner(**arguments)["input_ids"]


def test_others_find_the_part_for_videos(load, tmp_path):
    load("internvl").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text("utf-8"))
    assert settings == {"video_processor_type": "InternVLVideoProcessor"}


def test_the_library_is_left_as_it_was(load):
    from transformers import ProcessorMixin, SmolVLMProcessor
    from transformers.models.smolvlm import processing_smolvlm

    before = processing_smolvlm.num2words
    load("smolvlm")
    assert processing_smolvlm.num2words is before
    assert SmolVLMProcessor.check_argument_for_proper_class is ProcessorMixin.check_argument_for_proper_class

"""The processor of a legacy folder: its tokens and its pixels are the original's, or it is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoProcessor

from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.families.florence.legacy.processor import convert_processor
from caption_train.families.florence.tasks import expand_prompt
from tests.fixtures.florence_legacy import (
    FIXTURES,
    TIED,
    needs_fixtures,
    read_config,
    read_tensors,
    write_checkpoint,
)

pytestmark = needs_fixtures
FAMILY = get_family("florence")


@pytest.fixture(scope="module")
def tensors():
    return read_tensors()


@pytest.mark.parametrize("removed", [(), ("tokenizer.json",), ("tokenizer.json", "added_tokens.json")])
def test_prompts_are_encoded_as_the_original_does(tmp_path, removed):
    layout = "checkpoint_safetensors" if removed else "checkpoint"
    folder = shutil.copytree(FIXTURES / layout, tmp_path / "folder", copy_function=shutil.copyfile)
    folder.chmod(0o755)
    for name in removed:
        (folder / name).unlink()
    vision = read_config()["vision_config"] | {"max_position_embeddings": 50}
    processor = convert_processor(folder, vision, 1801)
    rows = json.loads((FIXTURES / "prompts.json").read_text())["rows"]
    assert len(rows) > 20
    for row in rows:
        assert expand_prompt(row["text"]) == row["prompt"]
        assert processor.tokenizer(row["prompt"])["input_ids"] == row["tiny"], row["text"]


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"size": 192}, {"size": {"height": 192, "width": 192}}),
        ({"do_normalize": False, "rescale_factor": 0.5}, {"do_normalize": False, "rescale_factor": 0.5}),
        ({"resample": None}, {"resample": 3}),
        (
            {"do_center_crop": True, "size": {"height": 64, "width": 64}, "crop_size": 64},
            {"do_center_crop": False},
        ),
    ],
)
def test_image_settings_are_the_files(tmp_path, tensors, saved, expected):
    folder = write_checkpoint(tmp_path / "model", tensors)
    (folder / "preprocessor_config.json").write_text(json.dumps(saved))
    images = FAMILY.load(str(folder))[1].image_processor
    assert {name: getattr(images, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"size": {"shortest_edge": 224}}, "needs a height and a width"),
        ({"do_resize": False}, "not resized to one size"),
        ({"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, "or cropped"),
        ({"size": {"height": 1632, "width": 1632}}, "51 × 51 places, but there are only 50 × 50"),
    ],
)
def test_image_settings_that_mean_nothing_here_are_refused(tmp_path, tensors, saved, message):
    folder = write_checkpoint(tmp_path / "model", tensors)
    (folder / "preprocessor_config.json").write_text(json.dumps(saved))
    with pytest.raises(CaptionTrainError, match=message):
        FAMILY.load(str(folder))


def test_tokens_that_a_user_added_are_kept(tmp_path, tensors):
    """They come before the 1024 in a folder that lacks these, as in the original."""
    grown = {name: tensor for name, tensor in tensors.items() if name not in TIED}
    grown |= {"language_model.final_logits_bias": torch.zeros(1, 1802)}
    grown[TIED[0]] = torch.cat([tensors[TIED[0]], torch.ones(1, 64)])
    folder = write_checkpoint(tmp_path / "model", grown)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 777, "content": "zwx", "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = FAMILY.load(str(folder))[1].tokenizer
    assert tokenizer("zwx<od><loc_0>")["input_ids"] == [0, 777, 778, 782, 2]


def test_a_special_token_that_only_the_settings_name_is_one(tmp_path, tensors):
    grown = {name: tensor for name, tensor in tensors.items() if name not in TIED}
    grown |= {"language_model.final_logits_bias": torch.zeros(1, 1802)}
    grown[TIED[0]] = torch.cat([tensors[TIED[0]], torch.ones(1, 64)])
    folder = write_checkpoint(tmp_path / "model", grown)
    (folder / "tokenizer_config.json").write_text('{"additional_special_tokens": ["<mine>"]}')
    tokenizer = FAMILY.load(str(folder))[1].tokenizer
    assert tokenizer("<mine><od>")["input_ids"] == [0, 777, 778, 2]


@pytest.mark.parametrize(("tidy", "expected"), [(True, "it isn't, no."), (False, "it is n't , no .")])
def test_text_is_tidied_up_where_the_folder_says_so(tmp_path, tensors, tidy, expected):
    """transformers 4 does, transformers 5 does not by itself; the original gave captions in 4."""
    folder = write_checkpoint(tmp_path / "model", tensors)
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": tidy}))
    processor = FAMILY.load(str(folder))[1]
    processor.save_pretrained(tmp_path / "native")
    again = AutoProcessor.from_pretrained(tmp_path / "native", backend="pil")
    for tokenizer in (processor.tokenizer, again.tokenizer):
        ids = tokenizer("it is n't , no .", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == expected


def test_a_saved_processor_asks_for_no_remote_code(tmp_path):
    """Fine-tunes carry `auto_map` in tokenizer_config.json too."""
    vision = read_config()["vision_config"] | {"max_position_embeddings": 50}
    processor = convert_processor(FIXTURES / "checkpoint_safetensors", vision, 1801)
    processor.save_pretrained(tmp_path)
    assert all("auto_map" not in path.read_text() for path in tmp_path.iterdir())
    assert AutoProcessor.from_pretrained(tmp_path, backend="pil").num_image_tokens == 577

"""No image, however odd, ends a folder or a run; how many tokens an image takes is bounded and said."""

import json

import pytest
from PIL import Image

from caption_train.captioning.batches.encoding import Encode
from caption_train.cli.commands import caption_main
from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.families.vlm.image_budget import count_image_tokens
from caption_train.families.vlm.images import fit_image, read_images
from caption_train.training.run.batches import Collate
from tests.fixtures.vlm import KINDS

ODD = [(1000, 4), (4, 1000), (1, 1), (3, 3), (3, 200), (1, 5000), (200, 1), (33, 17), (4000, 3000)]


@pytest.fixture(scope="module")
def family():
    return get_family("vlm")


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_are_read_and_captioned_in_one_batch(family, tiny_base, kind):
    model, processor = family.load(str(tiny_base(f"vlm/{kind}")))
    family.configure(processor, {})
    images = [Image.new("RGB", size, "red") for size in ODD]
    batch = family.encode(processor, images, ["hi"] * len(ODD))
    results = family.generate(model, processor, batch, max_new_tokens=3)
    assert len(results) == len(ODD)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (640, 480)), ((1000, 4), (1000, 20)), ((1, 1), (16, 16)), ((1600, 16), (1600, 32))],
)
def test_only_odd_sizes_are_changed(size, expected):
    image = Image.new("RGB", size, "red")
    assert fit_image(image).size == expected
    assert (fit_image(image) is image) == (size == expected)


def test_what_has_too_many_pixels_keeps_its_aspect():
    assert fit_image(Image.new("RGB", (4000, 3000)), 1_000_000).size == (1154, 866)


def test_an_image_that_is_refused_is_tried_as_a_square():
    def read(images):
        if any(image.width != image.height for image in images):
            raise ValueError("no")
        return {"sizes": [image.size for image in images]}

    images = [Image.new("RGB", (30, 30)), Image.new("RGB", (40, 20))]
    assert read_images(read, images) == {"sizes": [(30, 30), (40, 40)]}


def test_an_image_that_is_always_refused_is_named_and_the_others_are_captioned(tmp_path):
    class Picky:
        def encode(self, processor, images, prompts):
            if any(image.width == 7 for image in images):
                raise CaptionTrainError("an image of 7×9 pixels is refused: no")
            return {"count": len(images)}

    items = [{"path": tmp_path / f"{w}.png", "image": Image.new("RGB", (w, 9))} for w in (5, 7, 9)]
    encoded = Encode(Picky(), None, "")(items)
    assert encoded["inputs"] == {"count": 2} and encoded["error"] is None
    assert [item.get("error") for item in encoded["items"]] == [
        None,
        f"{tmp_path / '7.png'}: an image of 7×9 pixels is refused: no",
        None,
    ]


def test_an_image_that_is_always_refused_does_not_end_training():
    import torch

    def collate(items):
        if any(item["image"].width == 7 for item in items):
            raise CaptionTrainError("refused: no")
        return {"labels": torch.zeros(len(items), 1, dtype=torch.long)}

    items = [{"file": f"{w}.png", "caption": "a", "image": Image.new("RGB", (w, 9))} for w in (5, 7)]
    batch = Collate(collate)([*items, {"file": "x.png", "error": "x.png: gone"}])
    assert batch.files == ["5.png"] and batch.errors == ["7.png: refused: no", "x.png: gone"]
    assert batch.label_tokens == 1
    assert Collate(collate)(items[1:]).label_tokens == 0


def test_a_photo_of_more_tokens_than_positions_is_made_smaller(family, tiny_base):
    processor = family.load(str(tiny_base("vlm/qwen3_vl")))[1]
    size = processor.image_processor.size
    processor.image_processor.size = type(size)(shortest_edge=4096, longest_edge=2**24)
    images = [Image.new("RGB", (3000, 2000)), Image.new("RGB", (64, 64))]
    batch = family.encode(processor, images, ["hi", "hi"])
    assert batch["input_ids"].shape[1] <= processor.tokenizer.model_max_length
    assert batch["image_grid_thw"][1].tolist() == [1, 4, 4]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "llava_next", "gemma4"])
def test_max_pixels_means_fewer_tokens(family, tiny_base, kind):
    processor = family.load(str(tiny_base(f"vlm/{kind}")))[1]
    family.configure(processor, {})
    most = count_image_tokens(processor, (2000, 2000))
    family.configure(processor, {"max_pixels": 64 * 64})
    fewer = count_image_tokens(processor, (2000, 2000))
    assert fewer < most or kind == "gemma4"
    (line,) = family.describe_inputs(processor)
    assert line.startswith("images: at most 4,096 pixels (--max_pixels)") and f"{fewer:,} token" in line


def test_qwen_is_bounded_although_its_checkpoint_is_not(family, tiny_base):
    processor = family.load(str(tiny_base("vlm/qwen3_vl")))[1]
    size = processor.image_processor.size
    processor.image_processor.size = type(size)(shortest_edge=4096, longest_edge=2**24)
    processor.tokenizer.model_max_length = 100_000
    family.configure(processor, {})
    assert family.read_settings(processor) == {"system_prompt": "", "max_pixels": 1024 * 1024}
    assert count_image_tokens(processor, (4000, 3000)) <= 1024


def test_a_folder_with_odd_images_is_captioned(tiny_base, tmp_path, capsys):
    for index, size in enumerate(ODD[:5]):
        Image.new("RGB", size, "blue").save(tmp_path / f"{index}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    output = tmp_path / "captions.jsonl"
    flags = ["--images", tmp_path, "--base_model", tiny_base("vlm/qwen3_vl"), "--output", output]
    flags = [*map(str, flags), "--device", "cpu", "--num_workers", "0", "--max_token_length", "3"]
    assert caption_main("vlm", flags) == 1
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len(rows) == 5
    assert "5.png: not an image" in capsys.readouterr().err

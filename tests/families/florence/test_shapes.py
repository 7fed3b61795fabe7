"""Legacy checkpoints of any shape give the numbers that their tensors say, and come back from native."""

import random

import pytest
import torch
from PIL import Image

from caption_train.families import get_family
from caption_train.families.florence.legacy.config import convert_config
from caption_train.families.florence.legacy.export import restore_tensors
from caption_train.families.florence.legacy.names import legacy_name
from tests.fixtures.florence_legacy import (
    FIXTURES,
    TIED,
    needs_fixtures,
    read_config,
    read_golden,
    read_tensors,
    shrink_images,
    write_checkpoint,
)
from tests.fixtures.florence_reference import Reference

pytestmark = needs_fixtures
FAMILY = get_family("florence")


def choose_config(rng):
    """A legacy config of a tiny Florence-2, three or four stages deep."""
    stages, width = rng.choice([3, 4]), rng.choice([32, 48])
    heads, groups = ([rng.choice([1, 2, 4]) for _ in range(stages)] for _ in range(2))
    config = read_config()
    config["vision_config"] |= {
        "dim_embed": [h * g * rng.choice([4, 6]) for h, g in zip(heads, groups, strict=True)],
        "num_heads": heads,
        "num_groups": groups,
        "depths": [rng.choice([1, 2]) for _ in range(stages)],
        "patch_prenorm": [False, *(rng.random() < 0.7 for _ in range(stages - 1))],
        "patch_size": [7, 3, 3, 3][:stages],
        "patch_stride": [4, 2, 2, 2][:stages],
        "patch_padding": [3, 1, 1, 1][:stages],
        "window_size": rng.choice([3, 5, 12]),
        "projection_dim": width,
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": rng.choice([50, 64])},
    }
    config["text_config"] |= {
        "d_model": width,
        "encoder_layers": rng.choice([1, 3]),
        "decoder_layers": rng.choice([1, 2]),
        "encoder_attention_heads": rng.choice([2, 4]),
        "decoder_attention_heads": rng.choice([2, 4]),
        "encoder_ffn_dim": rng.choice([40, 80]),
        "decoder_ffn_dim": rng.choice([40, 80]),
        "activation_function": rng.choice(["gelu", "relu"]),
    }
    return config


def make_tensors(config, rng, positions):
    """Random tensors by their legacy names, large enough for every part to matter."""
    from transformers import Florence2ForConditionalGeneration

    places = config["vision_config"]["image_pos_embed"]["max_pos_embeddings"]
    shapes = {
        TIED[0]: (1801, config["text_config"]["d_model"]),
        "language_model.model.encoder.embed_positions.weight": (positions + 2, 0),
        "image_pos_embed.row_embeddings.weight": (places, 0),
    }
    with torch.device("meta"):
        model = Florence2ForConditionalGeneration(convert_config(config, shapes, tied=True, image_token_id=3))
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    tensors = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale = max(tensor[0].numel(), 1) ** -0.5 if tensor.ndim > 1 and "embed" not in name else 0.1
        tensors[legacy_name(name)] = noise * scale + (
            tensor.ndim == 1 and "norm" in name and "weight" in name
        )
    tensors["image_projection"] = tensors["image_projection"].T.contiguous()
    del tensors["visual_temporal_embed.pos_idx_to_embed"]
    return tensors | {name: tensors[TIED[0]].clone() for name in TIED}


def read_inputs(processor):
    image = Image.open(FIXTURES / "images" / "image_a.png").convert("RGB")
    item = {"image": image, "caption": "a red car<loc_5>"}
    batch = FAMILY.make_collator(processor, prompt="<CAPTION>", max_length=40)([item])
    text = batch["input_ids"][batch["input_ids"] != processor.image_token_id]
    return batch, text[None]


def test_the_reference_is_the_original():
    golden, tensors = read_golden()
    case = next(case for case in golden["cases"] if case["name"] == "r192_a_caption")
    reference = Reference(read_tensors(), read_config())
    ids, labels = torch.tensor(case["input_ids"]), torch.tensor(case["labels"])
    found = reference(tensors["r192_a_caption.pixel_values"], ids, labels)
    torch.testing.assert_close(found, tensors["r192_a_caption.logits"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_checkpoint_of_any_shape_gives_the_references_numbers(tmp_path, seed):
    rng = random.Random(seed)
    config = choose_config(rng)
    tensors = make_tensors(config, rng, positions=rng.choice([512, 1024, 4096]))
    if untied := seed % 2:
        tensors[TIED[3]] = tensors[TIED[3]] + 0.1
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    kept = rng.sample(TIED[:3], rng.randint(1, 3)) + ([TIED[3]] if untied or rng.random() < 0.5 else [])
    stored = {name: tensor for name, tensor in tensors.items() if name not in TIED or name in kept}
    layout, shards = rng.choice(["bin", "safetensors"]), rng.choice([1, 3])
    folder = write_checkpoint(tmp_path / "a model", stored, config=config, layout=layout, shards=shards)
    model, processor = FAMILY.load(str(shrink_images(folder)))
    batch, text = read_inputs(processor)
    with torch.no_grad():
        found = model(**batch)
        reference = Reference({name: tensor.float() for name, tensor in tensors.items()}, config)
        expected = reference(batch["pixel_values"], text, batch["labels"])
    torch.testing.assert_close(found.logits, expected, atol=2e-4, rtol=0)
    assert expected.std() > 0.1
    assert model.config.tie_word_embeddings == (not untied)
    restored = restore_tensors(model)
    assert all(torch.equal(restored[name], tensor.float()) for name, tensor in tensors.items())

"""CLIPScore with tiny random models, against its formula computed by hand."""

import pytest
import torch
from PIL import Image

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.evaluation.clip import measure_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP with random weights that reads words of a small vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    words = ["<s>", "</s>", "<unk>", "A", "photo", "depicts", "red", "dog", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 9, "max_position_embeddings": 12, "eos_token_id": 1},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, fast).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for colour in ("red", "green", "blue"):
        paths.append(folder / f"{colour}.png")
        Image.new("RGB", (20, 16), colour).save(paths[-1])
    return paths


def test_the_score_is_two_and_a_half_times_the_cosine(clip, images):
    from transformers import AutoModel, AutoProcessor

    captions = ["red", "dog", "cat red"]
    (found,) = measure_clip(clip, images, [captions], device=CPU, batch_size=2)
    model, processor = AutoModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    for path, caption, score in zip(images, captions, found, strict=True):
        inputs = processor(text=[f"A photo depicts {caption}"], images=Image.open(path), return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        cosine = torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item()
        assert score == pytest.approx(2.5 * max(cosine, 0), abs=1e-5)
    assert len({round(score, 4) for score in found}) > 1


def test_models_are_scored_on_the_same_images_and_long_captions_are_cut(clip, images):
    one, other = measure_clip(clip, images, [["red"] * 3, ["dog " * 40, "", "red"]], device=CPU, batch_size=4)
    assert one[2] == pytest.approx(other[2], abs=1e-5) and len(one) == len(other) == 3


def test_what_is_no_such_model_is_refused_in_one_line(tmp_path, images, tiny_base, clip):
    with pytest.raises(UsageError, match=r"--clip_model .*no folder with a model"):
        measure_clip(tmp_path, images, [["a"] * 3], device=CPU, batch_size=1)
    with pytest.raises(CaptionTrainError, match="--clip_model") as refusal:
        measure_clip(tiny_base("florence"), images, [["a"] * 3], device=CPU, batch_size=1)
    assert "\n" not in str(refusal.value)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in clip.iterdir():
        (damaged / file.name).write_bytes(
            file.read_bytes()[:200] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(CaptionTrainError, match="--clip_model") as refusal:
        measure_clip(damaged, images, [["a"] * 3], device=CPU, batch_size=1)
    assert "\n" not in str(refusal.value)

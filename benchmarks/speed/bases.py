"""Makes checkpoints with random weights and processors, and an adapter for each, for the speed benchmark.

Large and base models have the shapes of those on the hub, images of 384 (BLIP) or 768 pixels (Florence-2)
included. The small ones are for --quick; the tiny ones are those of examples/.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import make_config  # noqa: E402

TINY = {"blip": "blip-tiny", "florence": "florence2-tiny"}
SMALL_SIDE = {"blip": 384, "florence": 384}
SIDE = {"blip": 384, "florence": 768}
BERT_TOKENS = 30522
QWEN_2B = {
    "text": {
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        **{"max_position_embeddings": 4096, "tie_word_embeddings": True},
        "rope_parameters": {
            **{"rope_theta": 5e6, "rope_type": "default"},
            **{"mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
    },
    "vision": {
        **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
        **{"out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]},
        "num_position_embeddings": 2304,
    },
    "image": {"size": {"shortest_edge": 65536, "longest_edge": 1 << 20}},
}
"""What Qwen3-VL-2B has in other sizes than the tiny one of the tests."""


def make_base(name: str, folder: Path) -> Path:
    """Return the folder of a base, made there unless it is there already.

    Args:
        name: family and size, such as `blip-base`; sizes are tiny, small, base, large, for vlm 2b.
        folder: where bases lie.
    """
    family, _, size = name.partition("-")
    if size == "tiny":
        return ROOT / "examples" / "bases" / TINY[family]
    made = folder / name
    if not (made / "processor_config.json").exists():
        {"blip": _make_blip, "florence": _make_florence, "vlm": _make_vlm}[family](size, made)
    return made


def make_adapter(family_name: str, base: Path, folder: Path) -> Path:
    """Return the folder of a LoRA on the base's default targets; its B is random: it changes captions."""
    import torch
    from peft import LoraConfig, get_peft_model

    from caption_train.families import get_family

    if (folder / "adapter_config.json").exists():
        return folder
    family = get_family(family_name)
    facts = family.describe(str(base))
    model, _ = family.load(str(base))
    torch.manual_seed(1)
    targets = list(facts.lora_target_modules)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def _save(config: Any, processor: Any, folder: Path, **generation: Any) -> None:
    """Write a checkpoint of the configuration with random weights, and these settings of generation."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    # A usual head's logits lie so close together that rounding chooses between them.
    head = model.get_output_embeddings() or model.text_decoder.cls.predictions.decoder
    torch.nn.init.normal_(head.weight, std=0.3)
    model.generation_config.update(do_sample=False, **generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _make_blip(size: str, folder: Path) -> None:
    from transformers import BertTokenizer, BlipImageProcessorPil, BlipProcessor

    from examples.tiny_blip import make_tokenizer

    is_small = size == "small"
    words = make_tokenizer().get_vocab()
    words |= {f"[filler{index}]": index for index in range(len(words), BERT_TOKENS)}
    tokenizer = BertTokenizer(vocab=words, model_max_length=512)
    config = make_config("blip-base" if is_small else f"blip-{size}")
    side = SMALL_SIDE["blip"] if is_small else SIDE["blip"]
    if is_small:
        shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        config.vision_config.update(shape | {"num_hidden_layers": 6, "image_size": side})
        config.text_config.update(shape | {"num_hidden_layers": 2, "encoder_hidden_size": 192})
    config.text_config.update({"bos_token_id": BERT_TOKENS, "sep_token_id": 102, "pad_token_id": 0})
    image_processor = BlipImageProcessorPil(size={"height": side, "width": side})
    _save(config, BlipProcessor(image_processor, tokenizer), folder)


def _make_florence(size: str, folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, Florence2Processor

    from examples.tiny_florence import POST_PROCESSOR_CONFIG, make_tokenizer

    is_small = size == "small"
    side = SMALL_SIDE["florence"] if is_small else SIDE["florence"]
    image_processor = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    image_processor.image_seq_length = (side // 32) ** 2 + 1
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 1024
    processor = Florence2Processor(image_processor, tokenizer, post_processor_config=POST_PROCESSOR_CONFIG)
    config = make_config("florence-base" if is_small else f"florence-{size}")
    # Blocks skipped at random would make losses differ between a tower that is trained and its kept features.
    config.vision_config.update({"drop_path_rate": 0.0})
    if is_small:
        narrow = {"embed_dim": [32, 64, 128, 256], "num_heads": [1, 2, 4, 8], "num_groups": [1, 2, 4, 8]}
        config.vision_config.update(narrow | {"depths": [1, 1, 3, 1], "projection_dim": 192})
        config.text_config.update({"d_model": 192, "encoder_layers": 2, "decoder_layers": 2})
        config.text_config.update(dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 3))
        config.text_config.update(dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 768))
    config.image_token_id = processor.image_token_id
    # Without what the authors' checkpoints say, ours takes it for lost and adds it.
    _save(config, processor, folder, no_repeat_ngram_size=3, forced_bos_token_id=0, num_beams=3)


def _make_vlm(size: str, folder: Path) -> None:
    """Write Qwen3-VL in the sizes of 2B, with the tests' tokenizer and template."""
    from tests.fixtures import vlm

    tiny = vlm.make_qwen("qwen3_vl")
    tiny.text |= QWEN_2B["text"]
    tiny.config["vision_config"] |= QWEN_2B["vision"]
    tiny.image |= QWEN_2B["image"]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = vlm.make_tokenizer(tiny)
    tokenizer.save_pretrained(folder)
    template = (vlm.TEMPLATES / "qwen3_vl.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    config = tiny.config | {"text_config": tiny.text, "tie_word_embeddings": True}
    for file, content in (("config.json", config), ("preprocessor_config.json", tiny.image)):
        (folder / file).write_text(json.dumps(content), "utf-8")
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    read = AutoConfig.from_pretrained(folder)
    AutoModelForImageTextToText.from_config(read, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(tiny.processor), "utf-8")

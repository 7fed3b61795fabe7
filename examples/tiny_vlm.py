"""A LLaVA of under two million weights for the `vlm` family: SigLIP, projector and Llama, ChatML turns."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from caption_train.families.vlm.presets import DEFAULT_PROMPT
from examples.pretrain import TinyFamily
from examples.scenes import sample_scene
from examples.styles import STYLES, write_caption

SIDE = 96  # pixels
PATCH = 32  # one cell of the grid on which the scenes are laid out
WIDTH = 128
VOCABULARY = 480
IGNORED = -100
END, START, IMAGE = "<|im_end|>", "<|im_start|>", "<image>"
PAD = "<|endoftext|>"
SPECIAL_TOKENS = [PAD, START, END, IMAGE]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = {name: style.prompt for name, style in STYLES.items()} | {"plain": DEFAULT_PROMPT}
"""What asks for each style; the family's own prompt asks for plain sentences."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on captions and prompts of scenes; every text can be written with it."""
    rng = np.random.default_rng(0)
    texts = ["user\n", "assistant\n", *PROMPTS.values()] * 50
    texts += [write_caption(sample_scene(rng), style, rng) for style in STYLES for _ in range(300)]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, IMAGE],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_processor() -> LlavaProcessor:
    """The full processor: PIL images to 96 × 96 pixels, `<image>` repeated once per patch."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """SigLIP of four layers, Llama of four; the features are those of the tower's last layer."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def make_model() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model with random weights, and its processor."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    model = LlavaForConditionalGeneration(make_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    # The default starts all positions nearly alike, and "left of" is then learned late.
    embeddings = model.model.vision_tower.get_submodule("embeddings")
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    return model, processor


@functools.cache
def ask(processor: LlavaProcessor, style: str) -> str:
    """The rendered conversation up to where the answer begins."""
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[style]}],
    }
    return processor.apply_chat_template([turn], add_generation_prompt=True)


def make_batch(processor, images: list[Image.Image], styles: list[str], captions: list[str]) -> dict:
    """Prompt, caption and end of the turn, padded on the right to [B, T]; only caption and end are labels."""
    tokenizer = processor.tokenizer
    prompts = [ask(processor, style) for style in styles]
    texts = [f"{prompt}{caption}{END}" for prompt, caption in zip(prompts, captions, strict=True)]
    batch = dict(
        processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    patches = (SIDE // PATCH) ** 2
    for row, prompt in enumerate(prompts):
        labels[row, : len(tokenizer(prompt).input_ids) + patches - 1] = IGNORED
    batch.pop("token_type_ids", None)
    return {**batch, "labels": labels}


@torch.no_grad()
def generate(model, processor, images: list[Image.Image], style: str) -> list[str]:
    """Caption images greedily, asked for one style; all prompts are equally long."""
    inputs = processor(text=[ask(processor, style)] * len(images), images=images, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    tokens = model.generate(**inputs, max_new_tokens=80)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(tokens, skip_special_tokens=True)


VLM = TinyFamily(
    name="vlm-tiny",
    make=make_model,
    make_batch=make_batch,
    feature_module=lambda model: model.model.multi_modal_projector,
    feature_width=lambda model: model.config.text_config.hidden_size,
    generate=generate,
    steps=600,
    batch_size=48,
    learning_rate=1.5e-3,
)

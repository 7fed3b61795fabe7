"""A base for every family, small enough to train in a test: those of examples/, and a Moondream 2."""

from pathlib import Path

import torch

from caption_train.config.training import PARTS

REPOSITORY = Path(__file__).resolve().parent.parent


def make_moondream():
    """Moondream 2 with 28-pixel crops of four patches; it reads bytes, and its templates are three marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from caption_train.families.moondream.config import (
        MoondreamConfig,
        make_text_config,
        make_vision_config,
    )
    from caption_train.families.moondream.model import MoondreamForConditionalGeneration
    from caption_train.families.moondream.processor import MoondreamProcessor

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|ask|>", "<|md_reserved_0|>", "<|answer|>", *characters]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[0],
        eos_token=tokens[0],
        pad_token=tokens[0],
        additional_special_tokens=tokens[1:4],
    )
    text = {"dim": 64, "ff_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 272, "max_context": 128}
    vision = {"enc_dim": 32, "enc_ff_dim": 64, "enc_n_layers": 2, "enc_n_heads": 2, "crop_size": 28}
    config = MoondreamConfig(
        text_config=make_text_config(text),
        vision_config=make_vision_config(vision),
        projector_dim=64,
        max_crops=4,
        overlap_margin=0,
        bos_token_id=0,
        answer_token_id=3,
        templates={
            "caption": {task: [1, 4 + index, 3] for index, task in enumerate(("short", "normal", "long"))},
            "query": {"prefix": [1], "suffix": [3]},
        },
    )
    return MoondreamForConditionalGeneration(config), MoondreamProcessor.from_config(config, tokenizer)


def find_or_save_base(family: str, folder: Path) -> Path:
    """Return the family's base in examples/bases, or save one with random weights in `folder`."""
    if family in PRETRAINED:
        return REPOSITORY / "examples/bases" / PRETRAINED[family]
    torch.manual_seed(0)
    model, processor = make_moondream()
    # A LoRA leaves the head as it is, and a random one is too small for its logits to choose a token.
    model.lm_head.weight.data *= 10
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


PRETRAINED = {"blip": "blip-tiny", "florence": "florence2-tiny"}
OVERFIT = {
    "blip": ["--learning_rate", "5e-3", "--epochs", "30"],
    "florence": ["--learning_rate", "5e-3", "--epochs", "30"],
    "moondream": ["--learning_rate", "1e-2", "--epochs", "40", "--train_parts", *PARTS],
}
"""What a family's tiny base needs to learn four captions by heart in some seconds."""

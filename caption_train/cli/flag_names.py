"""Guesses which flag was meant by a name that is none. Standard library only."""

import difflib
from collections.abc import Iterable

_BASES, _ADAPTERS = ("model_id", "base_model"), ("peft_model", "init_adapter")
OTHER_NAMES = {
    **dict.fromkeys(("lr",), ("learning_rate",)),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_train_epochs"), ("epochs",)),
    **dict.fromkeys(("lora_r", "lora_rank", "network_dim", "dim", "r"), ("rank",)),
    **dict.fromkeys(("lora_alpha", "network_alpha"), ("alpha",)),
    **dict.fromkeys(("bs", "train_batch_size", "per_device_train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("grad_accum", "accumulation", "accumulate"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("num_beams",), ("beams",)),
    **dict.fromkeys(("max_new_tokens", "max_tokens"), ("max_token_length",)),
    **dict.fromkeys(("model", "base", "model_id", "base_model", "model_name_or_path"), _BASES),
    **dict.fromkeys(("pretrained_model_name_or_path",), _BASES),
    **dict.fromkeys(("lora", "adapter", "lora_path", "lora_weights", "peft_model"), _ADAPTERS),
    **dict.fromkeys(("network_weights", "init_adapter", "init_lora"), _ADAPTERS),
    **dict.fromkeys(("image", "input", "input_dir", "image_dir"), ("images",)),
    **dict.fromkeys(("train_data_dir", "data_dir", "dataset", "data"), ("dataset_dir",)),
    **dict.fromkeys(("bf16", "fp16"), ("mixed_precision", "dtype")),
    **dict.fromkeys(("resume_from_checkpoint",), ("resume",)),
    **dict.fromkeys(("force", "replace"), ("overwrite",)),
    **dict.fromkeys(("append", "prepend"), ("existing",)),
    **dict.fromkeys(("extension", "ext"), ("caption_extension",)),
    **dict.fromkeys(("out", "outdir"), ("output_dir", "output")),
}
"""What other tools call our flags: name → ours, the first that a script has."""


def guess_flag(name: str, flags: Iterable[str]) -> str | None:
    """Return the flag that an unknown name probably means, if any.

    >>> flags = ["rank", "learning_rate", "epochs"]
    >>> guess_flag("lr", flags), guess_flag("epoch", flags), guess_flag("xyzzy", flags)
    ('learning_rate', 'epochs', None)

    Args:
        name: what was written, without dashes before it.
        flags: the names of the flags that there are.
    """
    name, flags = name.replace("-", "_"), list(flags)
    candidates = [name, *OTHER_NAMES.get(name, ()), *difflib.get_close_matches(name, flags, 1)]
    return next((candidate for candidate in candidates if candidate in flags), None)

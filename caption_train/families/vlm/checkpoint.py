"""A checkpoint's small files: where they lie, what class loads it, which ids end an answer. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import UsageError
from caption_train.system.files import read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SIDE_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
"""Configs, templates and vocabularies, next to the weights on the hub."""


def find_folder(model_id: str, revision: str | None = None) -> Path:
    """Return the folder with a checkpoint's SIDE_FILES; what is missing of a hub id is downloaded."""
    from caption_train.families.loading import explained

    with explained(model_id):
        if Path(model_id).is_dir():
            return Path(model_id)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model_id, revision=revision, allow_patterns=SIDE_FILES))


def find_model_class(folder: Path, model_id: str) -> tuple[PretrainedConfig, type]:
    """Return a checkpoint's config and the class that loads it.

    Raises:
        UsageError: it is no image-text-to-text model, or one with scripts of its own, or its prompt and its
            answer are read by two models, so that there is no conversation to go on with.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from caption_train.families.loading import OWN_SCRIPTS, explained, name_scripts

    kind = read_json(folder / "config.json").get("model_type")
    if kind in OWN_SCRIPTS:
        raise UsageError(
            f"--model_id {model_id}: a {kind} model has scripts of its own: {name_scripts(kind)}"
        )
    with explained(model_id):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UsageError(
            f"--model_id {model_id}: a {config.model_type} model, not one that transformers knows to read an "
            "image and a text and to write a text"
        )
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise UsageError(
            f"--model_id {model_id}: a {config.model_type} model reads the prompt in an encoder and writes "
            "in a decoder; only models that go on with a conversation are trained and captioned with"
        )
    return config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def find_stop_ids(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the generation config's or the config's; the tokenizer's."""
    said = read_json(folder / "generation_config.json").get("eos_token_id")
    for holder in (config, config.get_text_config()):
        said = getattr(holder, "eos_token_id", None) if said is None else said
    ids = [said] if isinstance(said, int) else list(said or [])
    return list(dict.fromkeys([*ids, tokenizer.eos_token_id])) if tokenizer.eos_token_id is not None else ids


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, {} where there is no such file."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}

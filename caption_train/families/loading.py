"""Loads checkpoints with transformers, with one-line errors and with no weight left random."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.damage import describe_error, explaining_damage, find_damage, refuse_odd_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

T = TypeVar("T")

MINIMUM_TRANSFORMERS = (5, 13)
"""In older versions, the native Florence-2 class shifts the labels twice, so its loss is wrong."""

SIDE_FILES = ["*.json", "*.txt"]
"""Patterns of the config, tokenizer and image settings files, which lie beside the weights."""


def load_model(model_class: type, model_id: str, *, strict: bool = False, **keywords: Any) -> PreTrainedModel:
    """Load weights into `model_class`, in eval mode.

    Args:
        model_class: a model class of transformers.
        model_id: a folder, or a model on the hub.
        strict: whether a tensor that the model has no place for is an error too.
        keywords: arguments of `from_pretrained`; with a `config`, `model_class` was chosen by it.

    Raises:
        CaptionTrainError: the model cannot be loaded; tensors that the checkpoint lacks are named.
    """
    from transformers.utils import logging

    check_transformers()
    # This hides the bar that counts tensors while a file is read. Downloads still show theirs.
    logging.disable_progress_bar()
    with explained(model_id):
        # Some classes load several model types: a glmga checkpoint is loaded by Glm46V's.
        if "config" not in keywords:
            _check_kind(model_class, model_id, keywords.get("revision"))
        model, info = model_class.from_pretrained(
            model_id, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
        )
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, expected = wrong[0]
        raise CaptionTrainError(
            f"--model_id {model_id}: {len(wrong)} tensors have another shape than config.json says, such as "
            f"{name}: {tuple(stored)} instead of {tuple(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise CaptionTrainError(
            f"--model_id {model_id}: {len(missing)} tensors of {model_class.__name__} are not in the "
            f"checkpoint and would be random: {shorten(missing)}"
        )
    if strict and (left := sorted(info["unexpected_keys"])):
        raise CaptionTrainError(
            f"--model_id {model_id}: {len(left)} tensors of the checkpoint are no part of "
            f"{model_class.__name__}: {shorten(left)}"
        )
    return model.eval()


def load_processor(load: Callable[..., ProcessorMixin], model_id: str, **keywords: Any) -> ProcessorMixin:
    """Load a processor that resizes images with PIL, because torchvision's resampling gives other pixels."""
    with explained(model_id):
        return load(model_id, backend="pil", **keywords)


def load_config(model_class: type, model_id: str, revision: str | None = None) -> PretrainedConfig:
    """Return a model's config alone; an error as `load_model` has it where it is another kind's."""
    check_transformers()
    with explained(model_id):
        _check_kind(model_class, model_id, revision)
        return model_class.config_class.from_pretrained(model_id, revision=revision)


def find_side_files(model_id: str, revision: str | None = None) -> Path:
    """Return the folder with a model's SIDE_FILES, after downloading them if the model is on the hub.

    This asks the hub once and then uses the cache. Without a connection, transformers would wait half a
    minute.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_id, revision=revision, allow_patterns=SIDE_FILES))


@contextmanager
def explained(model_id: str) -> Iterator[None]:
    """Turn errors inside the `with` block into one line that says why `model_id` could not be read.

    See `explaining_damage` for what belongs inside.
    """
    if _looks_like_path(model_id) and not Path(model_id).is_dir():
        raise UsageError(f"--model_id {model_id}: there is no such folder")
    refuse_odd_files(model_id, f"--model_id {model_id}")
    with explaining_damage(f"--model_id {model_id}", partial(_reason, model_id)):
        yield


def guarding_load(load: Callable[..., T]) -> Callable[..., T]:
    """Make a family's `load`, or another method that reads a checkpoint, explain its errors in one line."""

    @wraps(load)
    def guarded(family: Any, model_id: str, *args: Any, **keywords: Any) -> T:
        with explained(model_id):
            return load(family, model_id, *args, **keywords)

    return guarded


def check_transformers() -> None:
    """Raise CaptionTrainError for a version of transformers whose loss or loading is known to be wrong."""
    import transformers

    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if version < MINIMUM_TRANSFORMERS:
        wanted = ".".join(map(str, MINIMUM_TRANSFORMERS))
        raise CaptionTrainError(
            f"transformers {transformers.__version__} shifts Florence-2's labels twice: "
            f"pip install 'transformers>={wanted}'"
        )


def shorten(names: list[str], most: int = 6) -> str:
    """Return the first few names, comma-separated, and how many more there are.

    >>> shorten(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _check_kind(model_class: type, model_id: str, revision: str | None) -> None:
    """Refuse a checkpoint of another family by its config, before its weights are downloaded."""
    config, _ = model_class.config_class.get_config_dict(find_side_files(model_id, revision))
    wanted, found = model_class.config_class.model_type, config.get("model_type")
    if found not in (None, wanted):
        raise UsageError(
            f"--model_id {model_id}: this is a {found} model, not {wanted}; {name_scripts(found)}"
        )


OWN_SCRIPTS = {
    "blip": ("train_blip_network.py", "inference.py"),
    "florence2": ("train_florence_lora.py", "inference_florence.py"),
    "moondream1": ("train_moondream_lora.py", "inference_moondream.py"),
}
"""Model types with a family of their own: its training and its inference script."""
OTHER_SCRIPTS = ("train_vlm_lora.py", "inference_vlm.py")


def name_scripts(model_type: str) -> str:
    """Return which scripts a model of a type is for.

    >>> name_scripts("blip")
    'it is for train_blip_network.py and inference.py'
    """
    return "it is for {} and {}".format(*OWN_SCRIPTS.get(model_type, OTHER_SCRIPTS))


def _looks_like_path(model_id: str) -> bool:
    return model_id.startswith(("/", "./", "../", "~")) or model_id.count("/") > 1 or "\\" in model_id


def _reason(model_id: str, error: BaseException) -> str:
    # transformers wraps the hub's errors, so the true reason may be several causes deep.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "ImportError" in kinds and (found := re.search(r"(\S+) requires the (\S+) library", str(chain[0]))):
        return f"{found[1]} needs {found[2]}: pip install {found[2].lower()}"
    if "GatedRepoError" in kinds:
        return "the hub asks for access: request it on the model's page and run `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "the hub has no such --revision"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no such model, or it is private: check the spelling, or run `hf auth login`"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
        return "not in the local cache, and the hub cannot be reached: go online once, or give a folder"
    if Path(model_id).is_dir() and isinstance(error, OSError) and not find_damage(model_id):
        return f"the folder is not a complete model: {describe_error(error)}"
    return find_damage(model_id) or describe_error(error)

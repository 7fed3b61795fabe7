"""Makes the native processor of a legacy Florence-2 folder, which encodes text and images as the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError
from caption_train.families.weight_files import read_object

if TYPE_CHECKING:
    from transformers import Florence2Processor, PreTrainedTokenizerBase

_PAIRED = ("cap", "ncap", "dcap", "grounding", "seg")
ADDED_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{number}>" for number in range(1000)),
    *(token for name in _PAIRED for token in (f"<{name}>", f"</{name}>")),
    "<sep>",
    *("<region_cap>", "</region_cap>", "<region_to_desciption>", "</region_to_desciption>"),  # misspelt there
    *("<proposal>", "</proposal>", "<poly>", "</poly>", "<and>"),
)
"""The 1024 tokens that the legacy processor adds to BART's vocabulary, in its order."""

IMAGE_TOKEN = "<image>"
UNREACHABLE = "madeupword"
"""Start of the names of fairseq's fillers in BART's vocabulary; no text is ever encoded to one."""

PREPROCESSOR_DEFAULTS = {
    "size": {"height": 768, "width": 768},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

POST_PROCESSOR_CONFIG = {
    "ocr": {"PATTERN": "(.+?)" + r"<loc_(\d+)>" * 8, "AREA_THRESHOLD": 0.0},
    "phrase_grounding": {"banned_grounding_tokens": []},
    **{name: {} for name in ("pure_text", "description_with_bboxes", "description_with_polygons")},
    **{name: {} for name in ("polygons", "bboxes", "description_with_bboxes_or_polygons")},
}
"""Required by transformers' processor for its own post-processing, which this toolkit does not use."""


def convert_processor(folder: Path, vision: Mapping[str, Any], rows: int) -> Florence2Processor:
    """Make the native processor of a legacy folder.

    Args:
        folder: the folder with tokenizer and image settings.
        vision: the vision_config, which determines how many tokens an image becomes.
        rows: how many entries the embedding has.

    Raises:
        CaptionTrainError: there is no tokenizer, it does not fit the embedding, or the image settings are not
            supported.
    """
    from transformers import CLIPImageProcessorPil, Florence2Processor

    tokenizer = load_tokenizer(folder, rows)
    settings = _read_image_settings(folder / "preprocessor_config.json")
    image_processor = CLIPImageProcessorPil(**settings, do_center_crop=False, do_convert_rgb=True)
    height, width = find_grid(settings["size"], vision)
    if (limit := vision["max_position_embeddings"]) < max(height, width):
        raise CaptionTrainError(
            f"images of {settings['size']} pixels become {height} × {width} places, but there are only "
            f"{limit} × {limit} embeddings for them"
        )
    image_processor.image_seq_length = 1 + height * width  # + 1: the average of all places comes first
    return Florence2Processor(image_processor, tokenizer, post_processor_config=POST_PROCESSOR_CONFIG)


def find_grid(size: Mapping[str, int], vision: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the last stage's grid for images of `size` pixels.

    Args:
        size: `height` and `width` of the image in pixels.
        vision: the vision_config.
    """
    sides = [size["height"], size["width"]]
    for kernel, stride, padding in zip(
        vision["patch_size"], vision["patch_stride"], vision["patch_padding"], strict=True
    ):
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
    return sides[0], sides[1]


def _read_image_settings(path: Path) -> dict[str, Any]:
    """Return preprocessor_config.json as arguments of the image processor, without the crop."""
    saved = {name: value for name, value in _read_if_there(path).items() if value is not None}
    settings = {name: saved.get(name, value) for name, value in PREPROCESSOR_DEFAULTS.items()}
    if isinstance(settings["size"], int):
        settings["size"] = {"height": settings["size"], "width": settings["size"]}
    size = settings["size"]
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        raise CaptionTrainError(f"{path}: size is {size!r}; Florence-2 needs a height and a width")
    crop = saved.get("crop_size", size) if saved.get("do_center_crop") else size
    if not saved.get("do_resize", True) or crop not in (size, size["height"]):
        raise CaptionTrainError(
            f"{path}: images are not resized to one size, or cropped; Florence-2 needs whole ones"
        )
    return settings


def load_tokenizer(folder: Path, rows: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a legacy folder; rows: how many entries the embedding has."""
    from tokenizers import AddedToken
    from transformers import BartTokenizer

    image_token = _choose_image_token(_read_vocabulary(folder))
    settings = [
        _read_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")
    ]
    own = [token for saved in settings for token in saved.get("additional_special_tokens") or ()]
    own = [token["content"] if isinstance(token, dict) else token for token in own]
    # If the folder says so, transformers 4 removed spaces before punctuation; 5 needs both of these flags.
    tidy = bool(settings[0].get("clean_up_tokenization_spaces"))
    try:
        tokenizer = BartTokenizer.from_pretrained(
            folder,
            extra_special_tokens=list(dict.fromkeys([*own, *ADDED_TOKENS])),
            image_token=image_token,
            mask_token=AddedToken("<mask>", lstrip=True, special=True),
            clean_up_tokenization_spaces=tidy,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=tidy,
        )
    except Exception as error:  # what tokenizers raises has no narrower type
        raise CaptionTrainError(f"the tokenizer of {folder} cannot be read: {error}") from error
    # `auto_map` names code of the repository, which AutoProcessor would ask to run.
    tokenizer.init_kwargs.pop("auto_map", None)
    if len(tokenizer) > rows:
        raise CaptionTrainError(
            f"the tokenizer of {folder} has {len(tokenizer)} entries, but the embedding only {rows} rows"
        )
    return tokenizer


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _choose_image_token(vocabulary: Mapping[str, int]) -> str:
    """Return an entry of the vocabulary to stand for the image, so that the embedding needs no new row.

    A new row would take part in the softmax and change the loss. No text is encoded to the entries chosen
    here.
    """
    if IMAGE_TOKEN in vocabulary:
        return IMAGE_TOKEN
    unreachable = [token for token in vocabulary if token.startswith(UNREACHABLE)]
    return max(unreachable, key=vocabulary.get, default="</region_to_desciption>")


def _read_vocabulary(folder: Path) -> dict[str, int]:
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise CaptionTrainError(
            f"{folder} has no tokenizer.json, nor vocab.json and merges.txt: copy them from the model it was "
            "made from"
        )
    vocabulary = {}
    for name in sorted(names & {"added_tokens.json", "vocab.json"}):
        vocabulary |= read_object(folder / name)
    if "tokenizer.json" in names:
        content = read_object(folder / "tokenizer.json")
        vocabulary |= content.get("model", {}).get("vocab", {})
        vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return vocabulary

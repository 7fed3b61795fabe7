"""Defines the flags of review_captions.py; config/training.py explains the form. Standard library only."""

import ipaddress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config.fields import LARGEST_SEED, find_above, find_below, find_not_utf8, flag
from caption_train.data.formats import IMAGE_SUFFIXES, with_dot

_folder = partial(flag, group="the folder")
_model = partial(flag, group="the model that suggests captions")
_page = partial(flag, group="the page")

LARGEST_PORT = 65535


@dataclass(frozen=True)
class ReviewOptions:
    """The flags of review_captions.py."""

    images: Path = _folder(None, "folder of images and captions, at any depth")
    caption_extension: str = _folder(".txt", "extension of the caption files beside the images")
    save_to: str = _folder(
        "auto",
        "where captions are: files beside the images, or rows of a metadata.jsonl in the folder; auto takes "
        "the metadata.jsonl if there is one, as training does",
        choices=("auto", "files", "metadata"),
    )
    output_dir: Path | None = _folder(
        None, "write what was accepted to this folder as a dataset (default: FOLDER-accepted, beside it)"
    )

    peft_model: Path | None = _model(None, "folder of the adapter (LoRA, IA3, …) that suggests captions")
    base_model: str | None = _model(None, "model that suggests captions (default: the adapter's)")
    family: str | None = _model(None, "family of the model (default: the adapter's)")
    revision: str | None = _model(None, "branch, tag or commit of the base model on the hub")
    device: str | None = _model(
        None, "device to run on, such as cuda, cuda:1, mps or cpu (found if not given)"
    )
    dtype: str = _model(
        "float32",
        "precision of the model; auto is the one that the adapter was trained in, else bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = _model(
        None, "hold the base in 4-bit NF4 (or 8bit): less memory", choices=("4bit", "8bit"), const="4bit"
    )
    prompt: str | None = _model(None, "text the model is given with an image (default: the adapter's)")
    max_token_length: int = _model(256, "longest suggestion in tokens")
    seed: int = _model(42, "seed of the first sampled suggestion of an image")

    port: int = _page(7860, "port of the page; 0 takes a free one")
    host: str = _page("127.0.0.1", "address to listen at; any but this machine's own demands a token")
    cache_mb: int = _page(500, "most megabytes of thumbnails to keep in the user's cache folder")
    quiet: bool = _page(False, "print errors and results only", recorded=False)

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    @property
    def suggests(self) -> bool:
        """Whether a model was named."""
        return bool(self.peft_model or self.base_model)

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine reach the page."""
        return is_loopback(self.host)

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        problems = [] if self.images else ["--images is required: the folder of images and captions"]
        # Images may have any name.
        problems += find_not_utf8(self, "images", "output_dir")
        problems += find_below(self, 0, "port", "seed") + find_below(self, 1, "max_token_length", "cache_mb")
        problems += find_above(self, LARGEST_PORT, "port") + find_above(self, LARGEST_SEED, "seed")
        if not set(self.caption_extension).isdisjoint("/\\\0") or not self.caption_extension.strip("."):
            problems.append(f"--caption_extension {self.caption_extension!r} is no file extension like .txt")
        elif with_dot(self.caption_extension).lower() in IMAGE_SUFFIXES:
            problems.append(f"--caption_extension {self.caption_extension} is an image's, not a caption's")
        if not self.host:
            problems.append("--host is empty; is a variable not set?")
        if not self.suggests and (self.family or self.prompt is not None or self.quantize):
            given = "family" if self.family else "quantize" if self.quantize else "prompt"
            problems.append(f"--{given} is for a model: give --peft_model or --base_model too")
        return problems


def is_loopback(host: str) -> bool:
    """Tell whether an address or name is this machine's own, which no other machine can reach.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

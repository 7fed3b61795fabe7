"""Defines the flags of compile_captions.py; config/training.py explains the form. Standard library only."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config.fields import find_below, flag
from caption_train.data.formats import IMAGE_SUFFIXES, with_dot

CAPTIONS_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

_pairs = partial(flag, group="finding pairs")
_kohya = partial(flag, group="Kohya-ss datasets")
_written = partial(flag, group="what is written")
_report = partial(flag, group="a page about the dataset")


@dataclass(frozen=True)
class CompileOptions:
    """The flags of compile_captions.py."""

    dataset_dir: Path = _pairs(None, "folder of images and caption files, at any depth")
    output_dir: Path | None = _written(
        None, "write the dataset to this folder (default: metadata.jsonl goes into dataset_dir)"
    )
    caption_extension: list[str] = _pairs(
        [".txt", ".caption"],
        "caption files end in this; repeatable, the first one found counts",
        repeated=True,
        metavar="EXT",
    )
    captions: list[Path] = _pairs(
        [],
        "captions in this file go before all others: LLaVA, ShareGPT, messages or COCO (.json, .jsonl), "
        "a table (.csv, .tsv) or .parquet; repeatable",
        repeated=True,
        metavar="FILE",
    )
    ignore_prompts: bool = _pairs(False, "leave out what --captions say was asked for a caption")
    encoding: str = _pairs("utf-8", "encoding of the caption files")
    follow_symlinks: bool = _pairs(False, "follow links that lead out of dataset_dir")
    check_images: bool = _pairs(False, "decode every image; leave out and name the bad ones")

    kohya_metadata: Path | None = _kohya(
        None, "captions and tags in this JSON go before caption files (default: found in dataset_dir)"
    )
    kohya_repeats: bool = _kohya(False, "write the images of a folder N_name N times")

    place_images: str = _written(
        "link",
        "images come into an output_dir elsewhere as hard links (copies where there can be none) or copies",
        choices=("link", "copy"),
    )
    validation_split: float = _written(
        0.0, "set this fraction of the images aside, in a column `split`; identical images stay together"
    )
    seed: int = _written(42, "seed of the validation split")
    overwrite: bool = _written(False, "replace a metadata.jsonl even where its captions differ")
    dry_run: bool = _written(False, "find and check everything, write nothing")
    list_all: bool = _written(False, "name every file in the summary, not the first 20 of a kind")
    quiet: bool = _written(False, "print errors and results only", recorded=False)

    report: Path | None = _report(
        None,
        "write a page about the dataset to this .html file: lengths, tags, and what is odd",
        metavar="FILE",
    )
    family: str | None = _report(None, "count the tokens of captions as this family does")
    model_id: str | None = _report(
        None, "model whose tokenizer counts: a hub id or a folder (default: the family's)"
    )
    revision: str | None = _report(None, "branch, tag or commit of the model on the hub")
    max_length: int = _report(
        256, "--max_length of the training script; captions that are cut there are named"
    )

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        problems = [] if self.dataset_dir else ["dataset_dir is required: the folder of images and captions"]
        problems += find_below(self, 0, "seed")
        if not 0 <= self.validation_split < 1:
            problems.append(
                f"--validation_split is a fraction, 0 or more and below 1, not {self.validation_split}"
            )
        for extension in self.caption_extension:
            if not set(extension).isdisjoint("/\\\0") or not extension.strip("."):
                problems.append(f"--caption_extension {extension!r} is no file extension like .txt")
            elif with_dot(extension).lower() in IMAGE_SUFFIXES:
                problems.append(f"--caption_extension {extension} is an image's, not a caption's")
        for path in self.captions:
            if path.suffix.lower() not in CAPTIONS_SUFFIXES:
                problems.append(f"--captions {path} must end in {', '.join(CAPTIONS_SUFFIXES)}")
        if self.ignore_prompts and not self.captions:
            problems.append("--ignore_prompts only has a meaning with --captions")
        problems += self._check_report()
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            problems.append(f"--encoding {self.encoding!r} is no text encoding Python knows, like cp1252")
        return problems

    def _check_report(self) -> list[str]:
        problems = find_below(self, 3, "max_length")
        if self.report and self.report.suffix.lower() not in (".html", ".htm"):
            problems.append(f"--report {self.report} must end in .html")
        if self.family and not self.report:
            problems.append("--family only has a meaning with --report")
        return problems + [
            f"--{name} only has a meaning with --family"
            for name in ("model_id", "revision", "max_length")
            if name in self.sources and not self.family
        ]

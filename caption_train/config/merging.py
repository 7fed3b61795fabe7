"""Defines the flags of merge_captions.py; config/training.py explains the form. Standard library only."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config.fields import find_not_utf8, flag

_input = partial(flag, group="images")
_output = partial(flag, group="captions")


@dataclass(frozen=True)
class MergeOptions:
    """The flags of merge_captions.py."""

    images: list[str] = _input([], "the images that were captioned, as the inference script was given them")
    recursive: bool = _input(False, "look into the folders inside a folder too")

    output: Path | None = _output(
        None, "the --output of the jobs: their files beside it are put together in this one"
    )
    columns: list[str] = _output(
        ["text"], "columns that hold captions: those that --prompts named, if it was given"
    )
    overwrite: bool = _output(
        False, "where this file has another caption of an image already, take that of the jobs"
    )
    save_captions: bool = _output(False, "check that every image has a caption file beside it")
    caption_extension: str = _output(".txt", "extension of those files")
    quiet: bool = _output(False, "print errors and results only", recorded=False)

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        problems = [] if self.images else ["--images is required"]
        problems += ["--images is empty; is a variable not set?"] if "" in self.images else []
        problems += find_not_utf8(self, "images", "output")
        if not self.output and not self.save_captions:
            problems.append("give --output to merge files, --save_captions to check caption files, or both")
        if self.output and self.output.suffix not in (".jsonl", ".csv"):
            problems.append(f"--output {self.output} must end in .jsonl or .csv")
        return problems

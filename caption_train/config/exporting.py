"""Defines the flags of export_adapter.py; config/training.py explains the form. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config.fields import find_not_utf8, flag
from caption_train.errors import UsageError

_source = partial(flag, group="what to export")
_target = partial(flag, group="how")
_proof = partial(flag, group="checking the result")


@dataclass(frozen=True)
class ExportOptions:
    """The flags of export_adapter.py."""

    source: Path = _source(None, "adapter folder, or a model: a folder or hub id")
    output_dir: Path = _source(None, "write the result to this folder")
    family: str | None = _source(
        None, "family of the model (default: the adapter's, else the one with two layouts)"
    )
    base_model: str | None = _source(None, "base of the adapter (default: the one it was trained on)")
    revision: str | None = _source(None, "branch, tag or commit of the model on the hub")

    merge: bool = _target(False, "merge the adapter into its base and write the whole model")
    layout: str = _target(
        "native",
        "native is what transformers 5 loads; legacy is what Microsoft's remote code, ComfyUI and other "
        "tools on transformers 4 load, or the authors' own code",
        choices=("native", "legacy"),
    )
    dtype: str = _target(
        "auto",
        "precision of the written weights; auto is that of the base, or float32 where that rounds a merge "
        "to other tokens",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    overwrite: bool = _target(False, "replace an output_dir that exists")

    image: Path | None = _proof(None, "caption this image before and after (default: a drawn one)")
    prompt: str | None = _proof(None, "text the model is given with it (default: the adapter's)")
    quiet: bool = _proof(False, "print errors and results only", recorded=False)

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        missing = [name for name in ("source", "output_dir") if getattr(self, name) is None]
        return [f"{name} is required" for name in missing] + find_not_utf8(self, "image")

    def check_paths(self) -> None:
        """Raise UsageError with everything that does not fit the files on disk, one line each."""
        problems = []
        if not self.is_adapter and (self.merge or self.base_model):
            used = "--merge" if self.merge else "--base_model"
            problems.append(f"{used} needs an adapter, but {self.source} holds no adapter_config.json")
        if self.is_adapter and not self.merge and self.dtype != "auto":
            problems.append("--dtype is for whole models: give --merge too")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            problems.append(f"output_dir {self.output_dir} is a file, not a folder")
        elif self.output_dir.exists() and not self.overwrite:
            problems.append(f"output_dir {self.output_dir} exists already; --overwrite replaces it")
        source = self.source.resolve()
        if self.output_dir.resolve() in (source, *source.parents):
            problems.append(f"output_dir {self.output_dir} is, or holds, what is exported: choose another")
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def is_adapter(self) -> bool:
        """Whether the source is an adapter, not a model."""
        return (self.source / "adapter_config.json").is_file()

"""An adapter or a model written in another form: merged, or as the legacy tools load it; and checked.

Knows no family: a family that has a second layout brings `save_legacy`, `save_adapter` and `prepare_merge`.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.errors import CaptionTrainError, UsageError, naming_model
from caption_train.flags import flag

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from caption_train.families.base import Family, Generated

ABOUT = ("training.json", "README.md")
"""What a trained adapter or model says of itself."""

_source = partial(flag, group="what to export")
_target = partial(flag, group="how")
_proof = partial(flag, group="checking the result")


@dataclass
class ExportOptions:
    """What export_adapter.py is asked to do."""

    source: Path = _source(None, "adapter folder, or a model: a folder or hub id")
    output_dir: Path = _source(None, "write the result to this folder")
    family: str | None = _source(None, "family of the model (default: the adapter's, else florence)")
    base_model: str | None = _source(None, "base of the adapter (default: the one it was trained on)")
    revision: str | None = _source(None, "branch, tag or commit of the model on the hub")

    merge: bool = _target(False, "merge the adapter into its base and write the whole model")
    layout: str = _target(
        "native",
        "native is what transformers 5 loads; legacy is what Microsoft's remote code, ComfyUI and other "
        "tools on transformers 4 load, or Moondream's own code",
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

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is no default came from: field name → "command line" or the config file."""

    def check(self) -> list[str]:
        """Return what is wrong with these options, one line each."""
        return [f"{name} is required" for name in ("source", "output_dir") if getattr(self, name) is None]

    def check_paths(self) -> None:
        """Raise UsageError with all that cannot work with what is on disk, one line each."""
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


def find_family(options: ExportOptions, default: str) -> str:
    """Return the family asked for, or the adapter's own, or `default`."""
    if options.family is None and options.is_adapter:
        from caption_train.adapter_info import read_adapter

        return read_adapter(options.source).family or default
    return options.family or default


def export(options: ExportOptions, family: Family) -> str:
    """Write what `options` ask for, prove it, and return what to tell the user.

    The result is written beside its place, loaded again and compared by the tokens it generates; only then it
    is renamed to `output_dir`. Raises CaptionTrainError when the tokens differ. With --dtype auto, a merge
    that its base's precision rounds to other tokens is written in float32 instead.
    """
    options.check_paths()
    if options.layout == "legacy" and not hasattr(family, "save_legacy"):
        raise UsageError(f"--layout legacy: {family.title} has one layout only")
    model_id, revision, prompt = _find_base(options, family)
    # What is a link stays one: the folder behind it is replaced.
    output_dir, base = options.output_dir.resolve(), Path(model_id).resolve()
    if base.is_dir() and output_dir in (base, *base.parents):
        raise UsageError(f"output_dir {options.output_dir} is, or holds, the base: choose another")
    image = open_proof_image(options.image)
    with naming_model("--base_model" if options.is_adapter else "source"):
        model, processor = family.load(model_id, revision=revision)
    if options.is_adapter:
        from caption_train.lora import load_adapter

        model = load_adapter(model, options.source, family)
    before = caption_once(family, model, processor, image, prompt)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=".export-", dir=output_dir.parent))
    try:
        partial_folder.chmod(0o755)
        whole = options.merge or not options.is_adapter
        if whole:
            _write_model(options, family, model, processor, partial_folder, (model_id, revision))
            del model
            model, processor = family.load(str(partial_folder))
        else:
            _write_adapter(options, family, model, partial_folder)
            model = load_adapter(family.load(model_id, revision=revision)[0], partial_folder, family)
        after = caption_once(family, model, processor, image, prompt)
        if before.token_ids != after.token_ids and options.merge and options.dtype == "auto":
            del model
            report = export(replace(options, dtype="float32"), family)
            return f"{report} in float32: the base's own precision rounds the merge to other tokens"
        check_same_tokens(before, after, options)
        for file in partial_folder.iterdir():
            file.chmod(0o644)  # safetensors makes files that nobody else can read
        _put_in_place(partial_folder, output_dir)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return (
        f"before: {before.text}\nafter:  {after.text}\n"
        f"The {len(after.token_ids)} tokens agree. Written to {options.output_dir}"
    )


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; what is there is removed once the new one has its name."""
    if not target.exists():
        folder.rename(target)
        return
    former = folder.with_name(f"{folder.name}-former")
    target.rename(former)
    folder.rename(target)
    shutil.rmtree(former)


def _find_base(options: ExportOptions, family: Family) -> tuple[str, str | None, str]:
    """Return model id, revision and prompt of what is to be loaded."""
    from caption_train.adapter_info import check_base, read_adapter, read_base_prompt

    if not options.is_adapter:
        model_id = options.source.as_posix()
        prompt = options.prompt or read_base_prompt(model_id, family.name) or family.default_prompt
        return model_id, options.revision, prompt
    adapter = read_adapter(options.source)
    model_id = options.base_model or adapter.base_model or family.model_id
    check_base(adapter, family.name, model_id, family.base_models)
    revision = options.revision or (adapter.revision if model_id == adapter.base_model else None)
    return model_id, revision, options.prompt or adapter.prompt or family.default_prompt


def _write_model(
    options: ExportOptions, family: Family, model: Any, processor: Any, folder: Path, base: tuple[str, Any]
) -> None:
    # The inference scripts find the prompt in training.json; an adapter's README.md is none of a model's.
    _copy_beside(options.source, folder, *(["training.json"] if options.is_adapter else ABOUT))
    if options.is_adapter:
        from caption_train.lora import find_shared

        getattr(family, "prepare_merge", lambda model: None)(model)
        if shared := find_shared(model):
            raise CaptionTrainError(
                f"an adapter of {', '.join(shared)} cannot be merged: its weights are shared"
            )
        model = model.merge_and_unload()
    model = model.to(_find_dtype(options, family, *base))
    if options.layout == "legacy":
        family.save_legacy(model, processor, folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def _write_adapter(options: ExportOptions, family: Family, model: Any, folder: Path) -> None:
    """Write the adapter that `model` carries, and what lay beside the one it came from."""
    _copy_beside(options.source, folder, *ABOUT)
    if hasattr(family, "save_adapter"):
        family.save_adapter(model.get_base_model(), options.source, folder, legacy=options.layout == "legacy")
    else:
        raise UsageError(
            f"{options.source} is {family.title}'s only layout already; --merge writes the model"
        )


def _copy_beside(source: Path, folder: Path, *names: str) -> None:
    for name in names:
        if (path := source / name).is_file():
            shutil.copyfile(path, folder / name)


def _find_dtype(options: ExportOptions, family: Family, model_id: str, revision: str | None) -> torch.dtype:
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    find = getattr(family, "find_dtype", None)
    return find(model_id, revision) if find else torch.float32


def caption_once(family: Family, model: Any, processor: Any, image: Image.Image, prompt: str) -> Generated:
    batch = family.encode(processor, [image], [prompt])
    (result,) = family.generate(model, processor, batch, num_beams=1, do_sample=False, max_new_tokens=40)
    return result


def check_same_tokens(before: Generated, after: Generated, options: ExportOptions) -> None:
    if before.token_ids == after.token_ids:
        return
    advice = "" if options.dtype == "float32" or not options.merge else "; --dtype float32 rounds nothing"
    raise CaptionTrainError(
        f"the result answers {after.text!r} instead of {before.text!r}, so nothing was written{advice}"
    )


def open_proof_image(path: Path | None) -> Image.Image:
    if path is None:
        return _draw_image()
    from caption_train.images import open_image

    return open_image(path)


def _draw_image() -> Image.Image:
    """Return a house under a sun: enough for every model to say something."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (640, 480), "#8ecae6")
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 330, 640, 480], fill="#588157")
    draw.ellipse([480, 40, 580, 140], fill="#ffb703")
    draw.rectangle([180, 200, 400, 380], fill="#d62828")
    draw.polygon([(150, 200), (290, 90), (430, 200)], fill="#6d4c41")
    draw.rectangle([260, 280, 320, 380], fill="#fefae0")
    return image

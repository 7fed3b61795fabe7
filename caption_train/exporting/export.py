"""An adapter or a model written in another form: merged, or as the legacy tools load it; and checked.

Knows no family: a family that has a second layout brings `save_legacy`, `save_adapter` and `prepare_merge`.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.config.exporting import ExportOptions
from caption_train.errors import CaptionTrainError, UsageError, naming_model
from caption_train.exporting.proof import caption_once, check_same_tokens, open_proof_image

if TYPE_CHECKING:
    import torch

    from caption_train.families.base import Family


ABOUT = ("training.json", "README.md")
"""What a trained adapter or model says of itself."""


def find_family(options: ExportOptions, default: str) -> str:
    """Return the family asked for, or the adapter's own, or `default`."""
    if options.family is None and options.is_adapter:
        from caption_train.adapters.record import read_adapter

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
        from caption_train.adapters.load import load_adapter

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
    from caption_train.adapters.record import check_base, read_adapter, read_base_prompt

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
        from caption_train.adapters.load import find_shared

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

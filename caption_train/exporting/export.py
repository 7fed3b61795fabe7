"""Writes an adapter or a model in another form (merged, or in the legacy layout), and checks it.

A family with a second layout provides `save_legacy`, `save_adapter` and `prepare_merge`.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caption_train.config.exporting import ExportOptions
from caption_train.errors import (
    CaptionTrainError,
    UsageError,
    find_os_error,
    is_out_of_memory,
    naming_model,
)
from caption_train.exporting.proof import caption_once, check_same_tokens, open_proof_image
from caption_train.families import CONVERTIBLE, FAMILIES
from caption_train.system.files import apply_umask
from caption_train.system.holder import Holder
from caption_train.system.lock import LOCK_FILE, OutputLock

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from caption_train.adapters.record import Base
    from caption_train.families.base import Family, Generated


PARTIAL = ".export-"
ABOUT = ("training.json", "README.md")
"""Files in which a trained adapter or model describes itself."""


def find_family(options: ExportOptions) -> str:
    """Return the family asked for, else the adapter's own, else the one whose adapters do not say their own.

    Raises UsageError for an adapter of a family that is not known here.
    """
    name = options.family
    if name is None and options.is_adapter:
        from caption_train.adapters.record import read_adapter

        name = read_adapter(options.source).family
    if name is not None and name not in FAMILIES:
        raise UsageError(f"{options.source}: of family {name}; give --family {'|'.join(FAMILIES)}")
    return name or CONVERTIBLE


def export(options: ExportOptions, family: Family) -> str:
    """Write what `options` ask for, check it, and return what to tell the user.

    The result is written to a temporary folder, loaded again, and compared by the tokens it generates. Only
    then is it renamed to `output_dir`. With --dtype auto, if rounding to the base's precision changes the
    tokens of a merge, it is written in float32 instead.

    Args:
        options: what to export.
        family: the model's family.

    Raises:
        UsageError: the options do not fit this source or family.
        CaptionTrainError: the result generates other tokens; nothing is written.
    """
    options.check_paths()
    if options.layout == "legacy" and not family.has_legacy_layout:
        raise UsageError(f"--layout legacy: {family.title} has one layout only")
    base = _resolve_base(options, family)
    # Resolved, so that a link stays and the folder that it points to is replaced.
    output_dir, folder = options.output_dir.resolve(), Path(base.model_id).resolve()
    if folder.is_dir() and output_dir in (folder, *folder.parents):
        raise UsageError(f"output_dir {options.output_dir} is, or holds, the base: choose another")
    image = open_proof_image(options.image)
    with naming_model("--base_model" if options.is_adapter else "source"):
        model, processor = _load(family, base)
    if options.is_adapter:
        from caption_train.adapters.load import load_adapter

        model = load_adapter(model, options.source, family)
    before = caption_once(family, model, processor, image, base.prompt)
    with _new_folder(output_dir, f"output_dir {options.output_dir}") as (partial_folder, lock):
        if options.merge or not options.is_adapter:
            _write_model(options, family, model, processor, partial_folder, base)
        else:
            _write_adapter(options, family, model, partial_folder)
        del model
        after = _caption_again(options, family, base, partial_folder, image)
        if before.token_ids != after.token_ids and options.merge and options.dtype == "auto":
            report = export(replace(options, dtype="float32"), family)
            return f"{report} in float32: the base's own precision rounds the merge to other tokens"
        check_same_tokens(before, after, options)
        lock.release()
        apply_umask(partial_folder)
        _put_in_place(partial_folder, output_dir)
    return (
        f"before: {before.text}\nafter:  {after.text}\n"
        f"The {len(after.token_ids)} tokens agree. Written to {options.output_dir}"
    )


def _caption_again(
    options: ExportOptions, family: Family, base: Base, folder: Path, image: Image.Image
) -> Generated:
    """Caption the image with what was written to `folder`."""
    if options.merge or not options.is_adapter:
        model, processor = _load(family, replace(base, model_id=str(folder), revision=None))
    else:
        from caption_train.adapters.load import load_adapter

        model, processor = _load(family, base)
        model = load_adapter(model, folder, family)
    result = caption_once(family, model, processor, image, base.prompt)
    # Its weights are mapped from the files, and Windows renames no folder with a file that is in use.
    del model
    gc.collect()
    return result


def _load(family: Family, base: Base) -> tuple[Any, Any]:
    model, processor = family.load(base.model_id, revision=base.revision)
    family.set_up(processor, base.model_id, base.settings, [base.prompt])
    return model, processor


@contextmanager
def _new_folder(output_dir: Path, name: str) -> Iterator[tuple[Path, OutputLock]]:
    """Yield a temporary folder beside `output_dir`, and its lock; delete what is left of it.

    Raises:
        CaptionTrainError: nothing can be written there; it begins with `name`.
    """
    from safetensors import SafetensorError

    folder = lock = None
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(output_dir.parent)
        folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=output_dir.parent))
        lock = OutputLock(folder)
        lock.acquire()
        yield folder, lock
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error) or (cause := find_os_error(error)) is None:
            raise
        raise CaptionTrainError(f"{name}: cannot be written: {cause.strerror or cause}") from error
    finally:
        if lock is not None:
            lock.release()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_abandoned(parent: Path) -> None:
    """Delete the folders of exports that were killed: those whose lock nobody holds any more."""
    for folder in parent.glob(f"{PARTIAL}{'?' * 8}"):
        with suppress(OSError):
            if not folder.is_symlink() and Holder.read(folder / LOCK_FILE).is_surely_dead():
                shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; remove the old `target` after that."""
    if not target.exists():
        folder.rename(target)
        return
    former = folder.with_name(f"{folder.name}-former")
    target.rename(former)
    folder.rename(target)
    shutil.rmtree(former)


def _resolve_base(options: ExportOptions, family: Family) -> Base:
    from caption_train.adapters.record import read_adapter, resolve_base

    adapter = read_adapter(options.source) if options.is_adapter else None
    model_id = options.base_model if options.is_adapter else options.source.as_posix()
    settings = dict.fromkeys(family.settings)
    return resolve_base(family, model_id, options.revision, options.prompt, adapter, settings=settings)


def _write_model(
    options: ExportOptions, family: Family, model: Any, processor: Any, folder: Path, base: Base
) -> None:
    # training.json holds the prompt for inference. An adapter's README.md would be wrong for a merged model.
    _copy_beside(options.source, folder, *(["training.json"] if options.is_adapter else ABOUT))
    if options.is_adapter:
        from caption_train.adapters.load import merge_adapter

        model = merge_adapter(model, family)
    model = model.to(_find_dtype(options, family, base))
    if options.layout == "legacy":
        family.save_legacy(model, processor, folder)
    else:
        model.save_pretrained(folder)
        family.save_processor(processor, folder)


def _write_adapter(options: ExportOptions, family: Family, model: Any, folder: Path) -> None:
    """Write the adapter in `options.source` with other names, and copy the files beside it."""
    _copy_beside(options.source, folder, *ABOUT)
    family.save_adapter(model.get_base_model(), options.source, folder, legacy=options.layout == "legacy")


def _copy_beside(source: Path, folder: Path, *names: str) -> None:
    for name in names:
        if (path := source / name).is_file():
            shutil.copyfile(path, folder / name)


def _find_dtype(options: ExportOptions, family: Family, base: Base) -> torch.dtype:
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return family.find_stored_dtype(base.model_id, base.revision)

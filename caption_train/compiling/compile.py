"""Runs the compile command: finds pairs in a folder and writes metadata.jsonl. No torch, no datasets."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from caption_train.compiling.advice import find_disagreeing, find_token_like
from caption_train.compiling.placement import find_prefix, place_images, plan_placement
from caption_train.compiling.result import Compiled
from caption_train.config.compiling import CompileOptions
from caption_train.data import kohya
from caption_train.data.caption_sources import Said, read_captions_file
from caption_train.data.formats import METADATA_NAME, TEXT_COLUMNS, is_portable
from caption_train.data.pairs import Pair, match_captions
from caption_train.data.rows import read_rows, write_metadata
from caption_train.data.scan import Folder, scan_folder
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, summarize


def compile_captions(options: CompileOptions) -> int:
    """Write metadata.jsonl and print what was found.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: the folders do not go together.
        CaptionTrainError: after the summary is printed, if there is no pair, if captions in `output_dir`
            would be lost, or if a file could not be read.
    """
    from caption_train.compiling.summary import print_summary

    compiled, losses = compile_folder(options)
    print_summary(compiled, options)
    raise_problems(compiled, losses)
    return 0


def compile_folder(options: CompileOptions) -> tuple[Compiled, list[str]]:
    """Write metadata.jsonl and, with --report, a page about the dataset, printing nothing.

    Returns:
        What was found and done, and a line for each row of an older metadata.jsonl that would have been lost:
        where there are any, nothing was written.
    """
    examination = None
    if options.report:
        from caption_train.compiling.report import measure, write_report
        from caption_train.examining.examine import Examination

        examination = Examination(options)
    compiled = find_pairs(options)
    broken = measure(examination, compiled) if examination else None
    # Collected before unusable pairs are dropped: the caption of a damaged image is still in its own file.
    known = {
        (compiled.file_name(name), pair.caption, pair.prompt)
        for name in compiled.pairs
        for pair in compiled.pairs_of(name)
    }
    leave_out_unusable(compiled, options, broken)
    compiled.disagreeing = find_disagreeing(compiled.pairs)
    compiled.token_like = find_token_like({n: compiled.pairs_of(n) for n in compiled.pairs})
    make_rows(compiled, options)
    target = compiled.output_dir / METADATA_NAME
    losses = [] if options.overwrite else find_losses(target, known)
    try:
        if compiled.rows and not losses:
            losses = _write(compiled, options)
    except OSError as error:
        raise CaptionTrainError(
            f"{escape_unprintable(error.filename or target)}: {error.strerror or error}"
        ) from error
    if examination:
        write_report(examination, compiled, options)
    return compiled, losses


def raise_problems(compiled: Compiled, losses: list[str]) -> None:
    """Raise CaptionTrainError where what `compile_folder` returned is not what was asked for."""
    from caption_train.compiling.summary import describe_nothing

    if not compiled.rows:
        raise CaptionTrainError(describe_nothing(compiled))
    if losses:
        target = compiled.output_dir / METADATA_NAME
        headline = f"{escape_unprintable(target)} is left as it is; --overwrite would replace"
        raise CaptionTrainError(summarize(headline, losses))
    if compiled.damaged:
        headline = f"{compiled.damaged} files could not be used, the others were:"
        raise CaptionTrainError(summarize(headline, compiled.list_damaged()))


def find_pairs(options: CompileOptions) -> Compiled:
    """Scan the dataset folder and match captions with images; Kohya's metadata wins over caption files."""
    output_dir, extensions = options.output_dir or options.dataset_dir, options.caption_extension
    folder = scan_folder(options.dataset_dir, extensions, follow_symlinks=options.follow_symlinks)
    prefix = find_prefix(options.dataset_dir, output_dir)
    source = options.kohya_metadata or kohya.find_metadata(folder)
    given, problems = kohya.read_metadata(source, folder) if source else ({}, [])
    said, sources, source_problems = _read_sources(options, folder)
    given |= {name: (entries[0].caption, entries[0].where) for name, entries in said.items()}
    matches = match_captions(folder, extensions, encoding=options.encoding, given=given)
    pairs, more = dict(matches.pairs), {}
    for name, entries in said.items():
        all_of_it = [
            Pair(pairs[name].image, entry.caption, entry.where, prompt=entry.prompt) for entry in entries
        ]
        pairs[name], more[name] = all_of_it[0], all_of_it[1:]
    return Compiled(
        *(folder, matches, output_dir, prefix, pairs, more, sources, source_problems, source, problems)
    )


def _read_sources(
    options: CompileOptions, folder: Folder
) -> tuple[dict[str, list[Said]], dict[str, int], list[str]]:
    """Return image → what `--captions` say of it, how many each file has, and what is wrong with others."""
    said: dict[str, list[Said]] = {}
    counts: dict[str, int] = {}
    problems: list[str] = []
    for path in options.captions:
        found, more = read_captions_file(path, folder)
        problems += more
        counts[str(path)] = sum(map(len, found.values()))
        for name, entries in found.items():
            if options.ignore_prompts:
                entries = [replace(entry, prompt=None) for entry in entries]
            known = said.setdefault(name, [])
            texts = {(entry.caption, entry.prompt) for entry in known}
            for entry in entries:
                if (entry.caption, entry.prompt) not in texts:
                    texts.add((entry.caption, entry.prompt))
                    known.append(entry)
    return said, counts, problems


def leave_out_unusable(
    compiled: Compiled, options: CompileOptions, broken: Mapping[str, str] | None = None
) -> None:
    """Drop pairs whose image name cannot be written or, with --check_images, one that cannot be decoded.

    Args:
        compiled: what was found.
        options: the options.
        broken: image → why it cannot be decoded, where all were decoded already.
    """
    pairs = compiled.pairs
    compiled.unnamable = [name for name in pairs if not is_portable(name)]
    if options.check_images:
        found = _check_images(pairs) if broken is None else broken
        compiled.bad_images = {name: reason for name, reason in found.items() if name in pairs}
    for name in {*compiled.unnamable, *compiled.bad_images}:
        del pairs[name]


def make_rows(compiled: Compiled, options: CompileOptions) -> None:
    """Split the pairs, and make one row of each; training pairs get as many rows as their folder asks for."""
    pairs = compiled.pairs
    folders = sorted({name.rpartition("/")[0] for name in pairs})
    compiled.repeats = {f: n for f in folders if (n := kohya.count_repeats(f"{f}/")) != 1}
    if options.kohya_repeats:
        _refuse_too_many(compiled.repeats)
        compiled.unrepeated = [name for name in pairs if not compiled.repeats_of(name)]
    if options.validation_split:
        # Only here, because it needs numpy.
        from caption_train.data.split import split_by_content

        _, held_out = split_by_content(list(pairs.values()), options.validation_split, options.seed)
        if pairs and not held_out:
            raise UsageError("--validation_split needs two different images at least")
        images = {pair.image for pair in held_out}
        compiled.held_out = {name for name, pair in pairs.items() if pair.image in images}
    for name in pairs:
        repeated = options.kohya_repeats and name not in compiled.held_out
        for pair in compiled.pairs_of(name):
            row = {"file_name": compiled.file_name(name), "text": pair.caption}
            if pair.prompt:
                row["prompt"] = pair.prompt
            if options.validation_split:
                row["split"] = "validation" if name in compiled.held_out else "train"
            compiled.rows += [row] * (compiled.repeats_of(name) if repeated else 1)


def find_losses(path: Path, known: set[tuple[str, str, str | None]]) -> list[str]:
    """Return what overwriting a metadata.jsonl would lose: extra columns, and captions of images still there.

    Args:
        path: the existing metadata.jsonl, if there is one.
        known: (file_name, caption, prompt) of every pair that was found this time.

    Returns:
        One line per row that holds something not found this time.
    """
    if not os.path.lexists(path):
        return []
    losses = []
    for number, row in read_rows(path):
        where = f"{path.name}:{number}"
        if isinstance(row, ValueError):
            losses.append(f"{where}: {row}")
            continue
        name = row.get("file_name")
        caption = next((row[column] for column in TEXT_COLUMNS if row.get(column) is not None), "")
        found = (name, str(caption).strip(), prompt := row.get("prompt"))
        is_known = _is_hashable(found) and found in known
        columns = sorted(row.keys() - {"file_name", "split", *TEXT_COLUMNS})
        if prompt is not None and is_known:
            columns.remove("prompt")
        if columns:
            losses.append(f"{where}: {name}: columns {', '.join(columns)}")
        elif not is_known and caption and _exists(path.parent, name):
            losses.append(f"{where}: {name}: {str(caption)[:60]}")
    return losses


def _is_hashable(found: tuple) -> bool:
    return all(isinstance(value, str | None) for value in found)


def _write(compiled: Compiled, options: CompileOptions) -> list[str]:
    """Place the images if needed and write metadata.jsonl; return the images in the way, if there are any."""
    placement, by_copy = [], options.place_images == "copy"
    if compiled.prefix is None:
        placement, conflicts = plan_placement(
            options.dataset_dir, compiled.pairs, compiled.output_dir, by_copy=by_copy
        )
        if conflicts and not options.overwrite:
            return [f"{name}: another image is there under this name" for name in conflicts]
    if not options.dry_run:
        compiled.output_dir.mkdir(parents=True, exist_ok=True)
        compiled.copied = place_images(placement, by_copy=by_copy)
        write_metadata(compiled.output_dir / METADATA_NAME, compiled.rows)
        compiled.written = True
    compiled.placed = len(placement)
    return []


def _check_images(pairs: dict[str, Pair]) -> dict[str, str]:
    """Return the images that cannot be decoded, and why. Training need not decode the others again."""
    from caption_train.data.image_index import inspect_images
    from caption_train.data.images import ImageError

    found = inspect_images([pair.image for pair in pairs.values()])
    return {
        name: str(error).removeprefix(f"{escape_unprintable(pairs[name].image)}: ")
        for name, error in zip(pairs, found, strict=True)
        if isinstance(error, ImageError)
    }


def _refuse_too_many(repeats: dict[str, int]) -> None:
    for folder, count in repeats.items():
        if count > kohya.MAX_REPEATS:
            raise UsageError(
                f"--kohya_repeats: folder {escape_unprintable(folder)} asks for {count:,} repeats, the "
                f"limit is {kohya.MAX_REPEATS:,}"
            )


def _exists(folder: Path, name: object) -> bool:
    try:
        return isinstance(name, str) and (folder / name).exists()
    except (OSError, ValueError):
        return False

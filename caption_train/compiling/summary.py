"""Prints what the compile command found: counts, the files left over and the next command."""

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from caption_train.config.compiling import CompileOptions
from caption_train.data.formats import METADATA_NAME, describe_unread
from caption_train.families import FAMILIES, get_family
from caption_train.system.console import escape_unprintable
from caption_train.system.launcher import start_command, training_launcher

if TYPE_CHECKING:
    from caption_train.compiling.result import Compiled

WIDTH = 78
LISTED = 20
_RULE = "─" * WIDTH


def print_summary(compiled: "Compiled", options: CompileOptions) -> None:
    """Print the counts, the files left over and, if a dataset was written, the commands that train on it."""
    lines = [escape_unprintable(options.dataset_dir), _RULE, *_count_lines(compiled, options), _RULE]
    left_over = list(_left_over_lines(compiled, options))
    lines += [*left_over, _RULE] if left_over else []
    target = compiled.output_dir / METADATA_NAME
    if compiled.written:
        lines += [f"Wrote {escape_unprintable(target)}", "", "Next, with the model of your choice:"]
        lines += _next_commands(compiled, options)
    elif options.dry_run and compiled.rows:
        lines += [f"Nothing written (--dry_run); this would go to {escape_unprintable(target)}"]
    if compiled.report:
        lines += [f"Wrote {escape_unprintable(compiled.report)}: open it in a browser"]
    if not options.quiet:
        _print(lines)


def describe_nothing(compiled: "Compiled") -> str:
    """Return one line that says why there is no pair and, if that is known, what to do."""
    folder, matches = compiled.folder, compiled.matches
    found = f"{len(folder.images)} images, {sum(map(len, folder.captions.values()))} caption files"
    line = f"{escape_unprintable(folder.root)}: no pair of image and caption ({found})"
    if matches.pairs:
        return f"{line}; all were left out, for the reasons above"
    if METADATA_NAME in folder.metadata:
        return f"{line}; the folder has a {METADATA_NAME}, which training reads as it is"
    if folder.links:
        return f"{line}; --follow_symlinks reads the {len(folder.links)} links that lead elsewhere"
    if folder.images:
        return f"{line}; give the ending of your caption files with --caption_extension"
    return line


def _count_lines(compiled: "Compiled", options: CompileOptions) -> Iterator[str]:
    files = Counter(extension for (_, extension), names in compiled.folder.captions.items() for _ in names)
    kinds = ", ".join(f"{count:,} {extension}" for extension, count in files.most_common())
    yield _line("images", len(compiled.folder.images))
    yield _line("caption files", files.total(), kinds if len(files) > 1 else next(iter(files), ""))
    if compiled.kohya_metadata:
        source = sum(
            pair.source.startswith(f"{compiled.kohya_metadata.name}: ") for pair in compiled.pairs.values()
        )
        yield _line("captions from Kohya metadata", source, compiled.kohya_metadata.name)
    for source, count in compiled.sources.items():
        yield _line("captions in that file", count, source)
    yield _line("pairs", len(compiled.pairs))
    if options.validation_split:
        yield _line("  for training", len(compiled.pairs) - len(compiled.held_out))
        yield _line("  for validation", len(compiled.held_out), f"by content, seed {options.seed}")
    if len(compiled.rows) != len(compiled.pairs):
        yield _line("rows, with repeats" if not compiled.more else "rows, all captions", len(compiled.rows))
    if compiled.prefix is None:
        linked, copied = compiled.placed - compiled.copied, compiled.copied
        yield _line("images new in output_dir", compiled.placed, f"{linked:,} hard links, {copied:,} copies")


def _left_over_lines(compiled: "Compiled", options: CompileOptions) -> Iterator[str]:
    for title, names, note in list_left_over(compiled, options):
        yield _line(title, len(names), note)
        yield from _list_names(names, None if options.list_all else LISTED)


def list_left_over(compiled: "Compiled", options: CompileOptions) -> list[tuple[str, Sequence[str], str]]:
    """Return (what it is, the files, what becomes of them) for all that made no pair, or is odd."""
    matches, folder = compiled.matches, compiled.folder
    bad = [f"{name}: {reason}" for name, reason in compiled.bad_images.items()]
    repeats = [f"{name}: {count}" for name, count in compiled.repeats.items()]
    once = "" if options.kohya_repeats else "written once; --kohya_repeats writes each image N times"
    inside = compiled.prefix is not None
    other = [n for n in folder.metadata if inside and compiled.file_name(n) != METADATA_NAME]
    kinds = [
        ("captions that cannot be read", matches.unreadable, ""),
        ("images that cannot be decoded", bad, "left out"),
        ("images of other formats", folder.unread, "; ".join(describe_unread(folder.unread))),
        (
            "names imagefolder cannot read",
            compiled.unnamable,
            "left out: a \\ or no UTF-8 in the name; rename",
        ),
        ("empty captions", matches.empty, "left out"),
        ("images without a caption", matches.without_caption, ""),
        ("captions without an image", matches.without_image, ""),
        ("captions of several images", matches.shared, "each gets it; a.png.txt would be a.png's own"),
        ("captions not used", matches.second, "another caption of the image goes first"),
        (
            "equal images, other captions",
            compiled.disagreeing,
            "training sees them all: is one of them meant?",
        ),
        (
            "captions that spell a token",
            compiled.token_like,
            "training takes it for plain text; delete what a tool left",
        ),
        ("entries not used", compiled.source_problems, "of --captions"),
        ("Kohya entries not used", compiled.kohya_problems, ""),
        ("Kohya repeat folders", repeats, once),
        ("images in 0_ folders", compiled.unrepeated, "left out, as Kohya does"),
        ("links not followed", folder.links, "--follow_symlinks follows what leads out of the folder"),
        ("no files, or unreadable folders", folder.unusable, ""),
        ("hidden, skipped", folder.hidden, ""),
        ("other metadata files inside", other, "datasets' imagefolder reads these too"),
    ]
    return [(title, names, note) for title, names, note in kinds if names]


def _list_names(names: Sequence[str], limit: int | None) -> Iterable[str]:
    yield from (f"     {escape_unprintable(name)}" for name in names[:limit])
    if limit and len(names) > limit:
        yield f"     … and {len(names) - limit:,} more; --list_all names them"


def _line(title: str, count: int, note: str = "") -> str:
    return f" {title:<29} {count:>9,}   {escape_unprintable(note)}".rstrip()


def _next_commands(compiled: "Compiled", options: CompileOptions) -> Iterator[str]:
    flags = ["--follow_symlinks"] if options.follow_symlinks and compiled.prefix is not None else []
    # The folder's own name, also for `.` and `..`.
    name = compiled.output_dir.resolve().name
    for command in list_training_commands(str(compiled.output_dir), name, FAMILIES, flags):
        yield f"  {command}"


def list_training_commands(
    dataset_dir: str, name: str, families: Iterable[str], flags: Sequence[str] = ()
) -> list[str]:
    """Return the commands that train on a dataset, one for each family.

    Args:
        dataset_dir: the dataset, as it is to be shown.
        name: what the LoRA's folder is called; "my-lora" if empty.
        families: their names.
        flags: further flags.
    """
    arguments = ["--dataset_dir", dataset_dir, "--output_dir", f"loras/{name or 'my-lora'}", *flags]
    return [
        shlex.join([*start_command("train", f.name, [*training_launcher(), f.training_script]), *arguments])
        for f in map(get_family, families)
    ]


def _print(lines: Iterable[str]) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))

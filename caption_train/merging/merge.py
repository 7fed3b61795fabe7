"""Puts the captions of several jobs into one file, and names what is missing or double. No torch."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.sinks.caption_paths import CaptionPaths
from caption_train.captioning.storage.names import FirstLines
from caption_train.config.merging import MergeOptions
from caption_train.data.formats import describe_unread
from caption_train.merging.shard_files import ShardFiles
from caption_train.system.console import count_things, escape_unprintable, print_line, print_problem


def merge_captions(options: MergeOptions) -> int:
    """Check what several jobs have captioned, and merge their files.

    Returns:
        The exit code. 0: every image has its caption, once. 1: some have none, and are named; or some have
        several, which are named too, and then nothing is written.

    Raises:
        UsageError: there is nothing to merge.
        CaptionTrainError: a job is still at work, or the file cannot be written.
    """
    inputs = find_inputs(options.images, recursive=options.recursive)
    print_line(*describe_unread(inputs.unread))
    problems = {"cannot be looked at": inputs.missing} if inputs.missing else {}
    if options.save_captions:
        lacking = _find_without_file(inputs.images, options.caption_extension)
        print_line(
            f"{len(inputs.images) - lacking.total:,} of {len(inputs.images):,} images have caption files"
        )
        problems |= {"without a caption file": lacking} if lacking else {}
    if options.output:
        with closing(ShardFiles(options)) as files:
            problems |= files.merge(inputs.images)
    for what, lines in problems.items():
        print_problem(f"{count_things(lines.total, 'image')} {what}:", *(f"  {line}" for line in lines))
        if lines.more:
            print_problem(f"  … and {lines.more:,} more")
    return 1 if problems else 0


def _find_without_file(images: Sequence[Path], extension: str) -> FirstLines:
    paths = CaptionPaths(extension)
    return FirstLines(escape_unprintable(image) for image in images if paths.find(image) is None)

"""Writes captions to files beside their images: `a.txt` beside `a.jpg`. Standard library only."""

import os
import re
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

from caption_train.captioning.outputs import Caption, Sink
from caption_train.captioning.sinks.caption_paths import CaptionPaths
from caption_train.captioning.sinks.existing import KEEP, Added, AddedLog, Existing
from caption_train.captioning.sinks.folder_locks import SHARD, FolderLocks
from caption_train.captioning.storage.image_list import folders_of
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.captioning.storage.shard import Shard
from caption_train.data.formats import IMAGE_SUFFIXES, MAX_CAPTION_BYTES
from caption_train.data.text import read_caption, refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.exclusive import Signature, create_atomically, replace_unchanged
from caption_train.system.files import behind_link, clear_temporary, read_regular_file


class Sidecars(Sink):
    """A caption file beside every image.

    Args:
        extension: of the caption files, with or without a dot.
        existing: what becomes of the caption files that exist when the run begins.
        rank: the rank of this process, which names its logs.
        locks: whether to lock the folders; not for the second of several kinds of captions of one run.
        shard: the part of the images that this job captions; others of the same count may be at work.
    """

    def __init__(
        self,
        extension: str,
        *,
        existing: Existing = KEEP,
        rank: int = 0,
        locks: bool = True,
        shard: Shard | None = None,
    ) -> None:
        self._shard = shard
        self._paths = CaptionPaths(extension)
        self._extension = self._paths.extension
        self._locks = FolderLocks(shard) if locks else None
        self._existing = existing
        self._rank = rank
        self._logs: dict[Path, AddedLog] = {}
        self._added: DiskDict[tuple] = DiskDict()
        self._found: DiskDict[tuple] = DiskDict()

    def open(self, images: Sequence[Path]) -> None:
        """Lock the images' folders, and delete what killed runs have left there.

        Raises:
            UsageError: a folder cannot be written to.
            CaptionTrainError: another run is writing to a folder.
        """
        if self._extension.lower() in IMAGE_SUFFIXES:
            raise UsageError(f"--caption_extension {self._extension} would write over images")
        folders = folders_of(images)
        for folder in folders:
            if not os.access(folder, os.W_OK):
                shown = escape_unprintable(folder)
                raise UsageError(f"--save_captions: {shown} cannot be written to; use --output instead")
        if self._locks:
            self._locks.take(folders)
        for folder in folders:
            hidden = self._paths.list_folder(str(folder))
            if self._locks:
                self._locks.refuse_others(folder, hidden)
            clear_temporary(folder, hidden)
            if self._existing.replaces:
                self._settle_other_logs(folder, hidden)
            if self._existing.mode == "overwrite":
                self._log(folder).discard()
        if self._existing.adds:
            self.begin(images)
            for folder in folders:
                for name, added in self._log(folder).read(self._existing.run).items():
                    self._added[str(folder / name)] = added
            self.was_complete = any(log.is_complete for log in self._logs.values())

    def find_lacking(self, images: Sequence[Path]) -> list[Path]:
        """Return those of these images that have no caption file, or are captioned again.

        Raises:
            UsageError: a caption's name is a link to nothing, or of what cannot be replaced or added to.
        """
        lacking = [image for image in images if self._lacks(image) or self._existing.replaces]
        return self._resume(images) if self._existing.adds else lacking

    def begin(self, images: Sequence[Path]) -> None:
        """Remember the caption files that may be replaced, to notice if somebody writes to them."""
        if self._existing.replaces:
            self._found = DiskDict()
            for image in images:
                path = self._paths.path_of(image)
                if (found := Signature.of(behind_link(path))) is not None:
                    self._found[str(path)] = astuple(found)

    def read(self, image: Path) -> str:
        """Return the text of an image's caption file; of a run that adds, what it has added."""
        if self._existing.adds:
            return self._added[str(self._paths.path_of(image))][1]
        path = self._paths.find(image)
        return "" if path is None else read_caption(path)

    def write(self, caption: Caption) -> Caption | None:
        """Write one caption file; one that somebody else has written since the run began stays."""
        path = self._paths.path_of(caption.image)
        there = None if self._existing.replaces else self._paths.find(caption.image)
        text: str | None = caption.text
        if self._existing.adds:
            text = self._add(path, caption.text)
        try:
            if text is None:
                done = False
            elif there is None and (found := self._find_signature(path)) is not None:
                done = replace_unchanged(behind_link(path), encode_caption(path, text), found)
            else:
                done = there is None and create_atomically(path, encode_caption(path, text))
        except OSError as error:
            raise CaptionTrainError(
                f"{escape_unprintable(path)}: cannot be written: {error.strerror or error}"
            ) from error
        return caption if done else _read_theirs(caption, there or path)

    def mark_added(self) -> None:
        """Write into the logs of all folders that the run is done."""
        for log in self._logs.values():
            log.mark_done(self._existing.run)

    def forget_added(self) -> None:
        """Delete these logs."""
        for log in self._logs.values():
            log.discard()

    def close(self) -> None:
        """Allow other runs to write to the folders."""
        for log in self._logs.values():
            log.close()
        if self._locks:
            self._locks.release()

    def _add(self, path: Path, text: str) -> str | None:
        """Return the new text of a caption file, which the log knows by now; None if it has changed."""
        found, source = self._find_signature(path), behind_link(path)
        old = "" if found is None else _read_text(path)
        if Signature.of(source) != found:
            return None
        encode_caption(path, text)  # What no file can hold is refused before the log says that it is there.
        added = Added((old,) if old else (), text)
        self._log(path.parent).note(self._existing.run, path.name, added)
        return self._existing.join(old, text)

    def _resume(self, images: Sequence[Path]) -> list[Path]:
        """Return the images that nothing was added to; complete what was only noted down."""
        lacking = []
        for image in images:
            path = self._paths.path_of(image)
            old = _read_text(path) if str(path) in self._found else ""
            added = self._added.get(str(path))
            if added is None:
                lacking.append(image)
            elif added[0] == ((old,) if old else ()):
                self.write(Caption(image, added[1]))
        return lacking

    def _find_signature(self, path: Path) -> Signature | None:
        """Return what `begin` saw of a caption file, None where there was none."""
        found = self._found.get(str(path))
        return None if found is None else Signature(*found)

    def _log(self, folder: Path) -> AddedLog:
        if folder not in self._logs:
            where = f"--save_captions: {escape_unprintable(folder)}"
            self._logs[folder] = AddedLog(folder, self._name_of_log(), self._rank, where)
        return self._logs[folder]

    def _name_of_log(self) -> str:
        return f"caption-train{self._extension}" + (f".{self._shard.name}" if self._shard else "")

    def _settle_other_logs(self, folder: Path, hidden: Sequence[str]) -> None:
        """Delete or refuse what runs with another --shard, that were cut short, say that they have added."""
        name = re.escape(f".caption-train{self._extension}")
        pattern = re.compile(rf"{name}(?:{SHARD})?\.\d+\.added", re.DOTALL)
        for log in (folder / name for name in hidden if pattern.fullmatch(name)):
            split = re.search(SHARD, log.name)
            if (split and int(split[1])) == (self._shard and self._shard.count):
                continue
            if self._shard is None and self._existing.mode == "overwrite":
                log.unlink(missing_ok=True)  # Of captions that are all replaced now.
                continue
            whose = f"with --shard I/{split[1]}" if split else "without --shard"
            raise CaptionTrainError(
                f"--save_captions: {escape_unprintable(log)}: a run {whose} that adds to captions was cut "
                "short there: finish it first, or delete that file and see what it has added"
            )

    def _lacks(self, image: Path) -> bool:
        # os.path, because it returns False for a name that is too long, where Path raises.
        if (path := self._paths.find(image)) is None:
            path = self._paths.free_path(image)
            if os.path.islink(path):  # noqa: PTH114
                shown = escape_unprintable(path)
                raise UsageError(f"--save_captions: {shown} is a link to nothing: delete it, or use --output")
            return True
        if self._existing.replaces and not path.is_file():
            raise UsageError(f"--save_captions: {escape_unprintable(path)} is no file: move it away")
        return False


def _read_text(path: Path) -> str:
    """Return what a caption file holds, its lines as they are."""
    try:
        text = read_regular_file(path, MAX_CAPTION_BYTES).decode("utf-8-sig")
        refuse_odd_characters(text)
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        raise UsageError(
            f"{escape_unprintable(path)}: nothing can be added to this caption: {reason}"
        ) from error
    return text.strip()


def encode_caption(path: Path, text: str) -> bytes:
    """Return what a caption file holds; CaptionTrainError for characters that none can hold."""
    try:
        refuse_odd_characters(text)
    except ValueError as error:
        raise CaptionTrainError(
            f"{escape_unprintable(path)}: the caption has {error}, which no caption file can hold"
        ) from None
    return f"{text}\n".encode()


def _read_theirs(caption: Caption, path: Path) -> Caption | None:
    """Return what somebody else has written; None if it cannot be read, or is still empty."""
    try:
        text = read_caption(path)
    except CaptionTrainError:
        return None
    return replace(caption, text=text, answer=None, remarks=()) if text else None

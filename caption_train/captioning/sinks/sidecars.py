"""Writes captions to files beside their images: `a.txt` beside `a.jpg`. Standard library only."""

import errno
import os
import re
from array import array
from collections.abc import Collection, Sequence
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

from caption_train.captioning.outputs import Caption, Sink
from caption_train.captioning.sinks.existing import KEEP, Added, AddedLog, Existing
from caption_train.captioning.storage.image_list import folders_of
from caption_train.captioning.storage.mapping import DiskDict
from caption_train.captioning.storage.shard import Shard
from caption_train.data.formats import IMAGE_SUFFIXES, MAX_CAPTION_BYTES
from caption_train.data.text import read_caption, refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, print_line
from caption_train.system.exclusive import Signature, create_atomically, replace_unchanged
from caption_train.system.files import behind_link, clear_temporary, read_regular_file
from caption_train.system.lock import OutputLock
from caption_train.system.processes import allow_open_files

_SHARD = r"\.shard-[0-9]+-of-([0-9]+)"
_LOCKS = re.compile(rf"\.caption-train(?:{_SHARD})?\.lock")


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
        self._holds_locks = locks
        self._extension = "." + extension.lstrip(".")
        self._existing = existing
        self._rank = rank
        self._logs: dict[Path, AddedLog] = {}
        self._added: DiskDict[tuple] = DiskDict()
        self._twins = _Twins()
        self._locks: list[OutputLock] = []
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
        if self._holds_locks:
            self._lock(folders)
        for folder in folders:
            hidden = self._twins.list_folder(str(folder))
            # Only now: of two runs that start at once, at least one finds the other's locks.
            if self._holds_locks:
                self._refuse_other_locks(folder, hidden)
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
                path = self.caption_path(image)
                if (found := Signature.of(behind_link(path))) is not None:
                    self._found[str(path)] = astuple(found)

    def read(self, image: Path) -> str:
        """Return the text of an image's caption file; of a run that adds, what it has added."""
        if self._existing.adds:
            return self._added[str(self.caption_path(image))][1]
        path = self.find(image)
        return "" if path is None else read_caption(path)

    def write(self, caption: Caption) -> Caption | None:
        """Write one caption file; one that somebody else has written since the run began stays."""
        path = self.caption_path(caption.image)
        there = None if self._existing.replaces else self.find(caption.image)
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
        for lock in self._locks:
            lock.release()
        self._locks = []

    def caption_path(self, image: Path) -> Path:
        """Return the path of an image's caption file.

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat.png", "dog.png", "dog.jpg"):
        ...     (folder / name).touch()
        >>> sidecars = Sidecars(".txt")
        >>> [sidecars.caption_path(folder / name).name for name in ("cat.png", "dog.png", "dog.jpg")]
        ['cat.txt', 'dog.png.txt', 'dog.jpg.txt']

        It is `a.txt`, or `a.png.txt` if that exists or another image has the same stem. Training prefers
        `a.png.txt` too. `a.png.webp` beside `a.png` gets `a.png.webp.txt`, because `a.png.txt` belongs to
        `a.png`.
        """
        full = image.with_name(image.name + self._extension)
        # os.path, because it returns False for a name that is too long, where Path raises.
        if os.path.exists(full) or self._twins.has(image):  # noqa: PTH110
            return full
        return image.with_name(image.stem + self._extension)

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
            path = self.caption_path(image)
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
        pattern = re.compile(rf"{name}(?:{_SHARD})?\.\d+\.added", re.DOTALL)
        for log in (folder / name for name in hidden if pattern.fullmatch(name)):
            split = re.search(_SHARD, log.name)
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

    def _lock(self, folders: Sequence[Path]) -> None:
        real = list(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))
        allow_open_files(len(real))
        for folder in real:
            self._locks.append(self._acquire(folder, self._lock_name, len(real)))

    @property
    def _lock_name(self) -> str:
        return f".caption-train.{self._shard.name}.lock" if self._shard else ".caption-train.lock"

    def _refuse_other_locks(self, folder: Path, hidden: Sequence[str]) -> None:
        """Raise CaptionTrainError where a run is at work that may caption the same images."""
        for name in hidden:
            found = _LOCKS.fullmatch(name)
            if not found or name == self._lock_name:
                continue
            if not (found[1] and self._shard and int(found[1]) == self._shard.count):
                self._acquire(Path(os.path.realpath(folder)), name).release()

    def _acquire(self, folder: Path, name: str, count: int = 1) -> OutputLock:
        """Take a lock in a folder, of `count` that are taken; CaptionTrainError where a run has it."""
        where = f"--save_captions: {escape_unprintable(folder)}"
        lock = OutputLock(folder, name, where, instead="wait until it is done")
        try:
            line = lock.acquire()
        except OSError as error:
            many = f"; {count:,} folders at once are too many" if error.errno == errno.EMFILE else ""
            raise CaptionTrainError(f"{where}: {error.strerror or error}{many}") from error
        if line:
            print_line(line)
        return lock

    def _lacks(self, image: Path) -> bool:
        # os.path, because it returns False for a name that is too long, where Path raises.
        if (path := self.find(image)) is None:
            path = self._free_path(image)
            if os.path.islink(path):  # noqa: PTH114
                shown = escape_unprintable(path)
                raise UsageError(f"--save_captions: {shown} is a link to nothing: delete it, or use --output")
            return True
        if self._existing.replaces and not path.is_file():
            raise UsageError(f"--save_captions: {escape_unprintable(path)} is no file: move it away")
        return False

    def find(self, image: Path) -> Path | None:
        """Return an image's caption file if it exists."""
        path, name, stem = _split(image)
        if os.path.exists(full := path + name + self._extension):  # noqa: PTH110
            return Path(full)
        if not os.path.exists(short := path + stem + self._extension):  # noqa: PTH110
            return None
        return None if _is_named_as_another(path, stem) else Path(short)

    def _free_path(self, image: Path) -> str:
        """Return the path of an image's caption file where there is none yet."""
        path, name, stem = _split(image)
        return path + (name if self._twins.has(image) else stem) + self._extension


class _Twins:
    """Finds images that share their stem with another image in their folder. Each folder is listed once.

    Of a folder only shared stems are remembered, by hashes of 64 bits: of a million images none, as a rule.
    """

    def __init__(self) -> None:
        self._shared: dict[str, Collection[int]] = {}

    def has(self, image: Path) -> bool:
        """Tell whether another image has this stem, or this stem as its full name."""
        path, _, stem = _split(image)
        folder = path[:-1] or path or os.curdir
        if folder not in self._shared:
            self.list_folder(folder)
        return hash(stem) in self._shared[folder] or _is_named_as_another(path, stem)

    def list_folder(self, folder: str) -> list[str]:
        """Look which stems several images in a folder have; return the names there that begin with a dot."""
        import numpy as np

        stems, hidden = array("q"), []
        is_image = cache(lambda suffix: suffix.lower() in IMAGE_SUFFIXES)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    hidden.append(name)
                dot = name.rfind(".")
                if dot > 0 and is_image(name[dot:]):
                    stems.append(hash(name[:dot]))
        found = np.frombuffer(stems, np.int64) if stems else np.empty(0, np.int64)
        found.sort()
        self._shared[folder] = frozenset(found[1:][found[1:] == found[:-1]].tolist())
        return hidden


def _split(image: Path) -> tuple[str, str, str]:
    """Return an image's folder with its separator, its name and its stem, as text: paths are slow."""
    text = str(image)
    start = text.rfind(os.sep) + 1
    dot = text.rfind(".", start + 1, -1)
    return text[:start], text[start:], text[start:] if dot < 0 else text[start:dot]


def _is_named_as_another(path: str, stem: str) -> bool:
    """Tell whether a stem is another image's full name, as for `a.png.webp` beside `a.png`."""
    is_images = stem[stem.rfind(".") :].lower() in IMAGE_SUFFIXES
    return is_images and os.path.lexists(path + stem)


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

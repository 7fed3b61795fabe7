"""Finding images and the caption files beside them. Standard library only."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caption_train.errors import CaptionTrainError, UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its caption.

    source: where the caption was read, `a/b.txt` or `metadata.jsonl:12`. split: train, validation or test.
    prompt: what the model is asked for this caption, None for what the run asks.
    """

    image: Path
    caption: str
    source: str
    split: str = "train"
    prompt: str | None = None

    @property
    def texts(self) -> dict[str, str]:
        """Caption and, where there is one, prompt, by their names in a collator's items."""
        return {"caption": self.caption} | ({"prompt": self.prompt} if self.prompt else {})


@dataclass
class Folder:
    """The files of one dataset folder, relative to `root` with `/` between parts, in natural order.

    captions: (path without its extension, extension as the user wrote it) → files. The rest was left alone:
    hidden files and folders, symbolic links not followed, what is no regular file or cannot be listed.
    metadata: files that datasets' imagefolder would read as metadata.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    captions: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def scan_folder(
    root: Path | str,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    *,
    recursive: bool = True,
    follow_symlinks: bool = False,
) -> Folder:
    """Walk a folder once and sort its files into images and captions; extensions match in any case.

    Symbolic links that lead out of the folder are followed only on request, and never round a loop.
    """
    folder = Folder(Path(root))
    if not folder.root.is_dir():
        raise UsageError(f"{printable(root)}: {'not a folder' if folder.root.exists() else 'no such folder'}")
    extensions = sorted(map(with_dot, caption_extensions), key=len, reverse=True)
    captions: list[tuple[str, str]] = []
    for name in _walk(folder, recursive, follow_symlinks):
        if _is_image(name):
            folder.images.append(name)
        elif extension := next((e for e in extensions if name.lower().endswith(e.lower())), None):
            captions.append((name, extension))
        elif name.rpartition("/")[2] in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
            folder.metadata.append(name)
    folder.images.sort(key=natural_key)
    # `a.txt` goes before `a.TXT` where both are there.
    for name, extension in sorted(captions, key=lambda c: (not c[0].endswith(c[1]), c[0])):
        folder.captions.setdefault((name[: -len(extension)], extension), []).append(name)
    for names in (folder.hidden, folder.links, folder.unusable):
        names.sort(key=natural_key)
    return folder


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key in which folders are compared part by part and numbers by their value."""
    # Without the extension, or z2.png would come before z.png.
    parts = _DIGITS.split(_without_suffix(name).replace("/", "\0"))
    return [(1, int(part)) if i % 2 else (0, part) for i, part in enumerate(parts)] + [(0, name)]


def with_dot(extension: str) -> str:
    """Return `.txt` for `txt` and for `.txt`."""
    return extension if extension.startswith(".") else f".{extension}"


def read_caption(path: Path | str, encoding: str = "utf-8") -> str:
    """Return the caption in a file as one line: its lines stripped, empty ones dropped, joined by a space.

    A byte order mark is dropped and any kind of line end is one. Raises CaptionTrainError, naming the file,
    for what is no regular file, is not text in `encoding`, holds NUL characters or is longer than 1 MB.
    """
    try:
        return _decode(_read_bytes(path), encoding)
    except OSError as error:
        raise CaptionTrainError(f"{printable(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise CaptionTrainError(f"{printable(path)}: {error}") from error


def refuse_odd_characters(text: str) -> None:
    """Raise ValueError for what no caption holds and no tokenizer takes."""
    if "\0" in text:
        raise ValueError("NUL characters, so this is no text")
    if _SURROGATE.search(text):
        raise ValueError("half characters (lone surrogates)")


def join_lines(text: str) -> str:
    """Return text as one line, as `read_caption` joins it."""
    return " ".join(line for line in (line.strip() for line in text.splitlines()) if line)


def printable(text: object) -> str:
    """Return text that takes one line and can be printed: control and lone surrogate characters escaped."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


_SURROGATE = re.compile("[\ud800-\udfff]")
_DIGITS = re.compile("([0-9]+)")
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if "/" in suffix else stem or name


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


def _read_bytes(path: Path | str) -> bytes:
    # Opened without blocking, since a named pipe would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_CAPTION_BYTES:
            raise ValueError(f"{status.st_size / 1e6:.1f} MB, longer than any caption (limit 1 MB)")
        return file.read()


def _decode(data: bytes, encoding: str) -> str:
    plain = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    if plain and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(
            "not UTF-8 but UTF-16, by its first bytes; compile_captions.py --encoding utf-16 reads it"
        )
    try:
        text = data.decode("utf-8-sig" if plain else encoding)
    except UnicodeError as error:
        at = f" (position {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        hint = (
            "; compile_captions.py --encoding cp1252, or whatever it was written in, reads it"
            if plain
            else ""
        )
        raise ValueError(f"not {encoding.upper()} text{at}{hint}") from error
    refuse_odd_characters(text)
    return join_lines(text)


def _walk(folder: Folder, recursive: bool, follow_symlinks: bool) -> Iterator[str]:
    """Yield the regular files under `folder.root`, noting in it what was left alone."""
    real_root = os.path.realpath(folder.root)
    seen: set[tuple[int, int]] = set()
    # Real folders are emptied before links, so that a link to a folder already walked adds nothing.
    pending, linked = [""], []
    while pending or linked:
        inner = pending.pop() if pending else linked.pop()
        try:
            status = (folder.root / inner).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(folder.root / inner))
        except OSError as error:
            folder.unusable.append(f"{inner or '.'}: {error.strerror}")
            continue
        for entry in entries:
            name = f"{inner}/{entry.name}" if inner else entry.name
            kind = _kind(entry, real_root, follow_symlinks)
            if entry.name.startswith("."):
                folder.hidden.append(name)
            elif kind == "file":
                yield name
            elif kind == "folder" and recursive:
                (linked if entry.is_symlink() else pending).append(name)
            elif kind == "link":
                folder.links.append(name)
            elif kind == "other":
                folder.unusable.append(f"{name}: not a regular file")


def _kind(entry: os.DirEntry, real_root: str, follow_symlinks: bool) -> str:
    """Return file, folder, link (one that is not followed) or other."""
    try:
        if entry.is_symlink() and not follow_symlinks:
            inside = is_inside(os.path.realpath(entry.path), real_root)
            return "file" if inside and entry.is_file() else "link"
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a loop of links
        return "other"


def is_inside(path: str, folder: str) -> bool:
    """Tell whether a real path lies in or below a real folder."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)

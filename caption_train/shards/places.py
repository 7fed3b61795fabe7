"""Finds shards by what a user names: files, folders, globs, braces, and URLs through fsspec."""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.data.formats import IMAGE_SUFFIXES, natural_key
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.shards.parquet import ParquetReader
from caption_train.shards.records import ONE_CAPTION, ShardReader
from caption_train.shards.tar import TarReader
from caption_train.system.console import escape_unprintable

READERS: dict[str, type[ShardReader]] = {".tar": TarReader, ".parquet": ParquetReader}
PACKED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
# At least two letters, since C:/ is a drive; Path("s3://a") drops one of the slashes.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_EXPANDED = 1_000_000


@dataclass(frozen=True)
class Shard:
    """A file of records. place: its path or URL. stamp: what changes when somebody writes it."""

    place: str
    stamp: str = ""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.place.rstrip("/").rpartition("/")[2]

    @property
    def kind(self) -> str:
        """`.tar` or `.parquet`."""
        return suffix_of(self.place)

    @property
    def is_remote(self) -> bool:
        """Whether it is reached through fsspec."""
        return is_url(self.place)


def is_url(place: str) -> bool:
    """Tell whether a place has a scheme, such as `s3://`.

    >>> is_url("s3://bucket/a.tar"), is_url("C:/a.tar"), is_url("a.tar")
    (True, False, False)
    """
    return _SCHEME.match(place) is not None


def complete_url(place: Path | str) -> str:
    """Return a place with both slashes after its scheme, which a Path has lost."""
    return _SCHEME.sub(r"\1://", str(place), count=1)


def suffix_of(place: str) -> str:
    """Return which kind of shard a name says it is, `.tar` or `.parquet`; "" for anything else."""
    name = place.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern with braces stands for, as WebDataset and shells write it.

    >>> expand_braces("a{08..10}.tar"), expand_braces("{x,y}/{0..1}")
    (['a08.tar', 'a09.tar', 'a10.tar'], ['x/0', 'x/1', 'y/0', 'y/1'])

    Raises:
        UsageError: it stands for more than a million names.
    """
    parts, end, count = [], 0, 1
    for match in _BRACES.finditer(pattern):
        choices = _list_choices(match[1])
        if choices is not None:
            parts += [[pattern[end : match.start()]], choices]
            end, count = match.end(), count * len(choices)
        if count > MOST_EXPANDED:
            raise UsageError(f"{escape_unprintable(pattern)}: stands for more than {MOST_EXPANDED:,} names")
    return ["".join(chosen) for chosen in itertools.product(*parts, [pattern[end:]])]


def _list_choices(inside: str) -> list[str] | None:
    if numbers := _RANGE.fullmatch(inside):
        first, last = int(numbers[1]), int(numbers[2])
        last = min(last, first + MOST_EXPANDED)  # One more than are allowed.
        width = max(len(numbers[1]), len(numbers[2])) if numbers[1].startswith("0") else 0
        return [f"{number:0{width}}" for number in range(first, last + 1)]
    return inside.split(",") if "," in inside else None


def names_shards(places: Sequence[str]) -> bool:
    """Tell whether what a user names are shards: by their names, or because a folder holds nothing else."""
    return any(is_url(place) or suffix_of(place) or _is_folder_of_shards(place) for place in places)


def _is_folder_of_shards(place: str) -> bool:
    """Tell whether a folder holds shards, and no images beside them."""
    names = set()
    try:
        with os.scandir(Path(place).expanduser()) as entries:
            for entry in entries:
                if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    return False
                names.add(entry.name)
    except (OSError, ValueError, RuntimeError):
        return False
    kinds = {suffix_of(name) for name in names if not name.startswith(".")}
    # img2dataset's folders of files have a Parquet file with the addresses of each beside them.
    stems = {name[: -len(".parquet")] for name in names if suffix_of(name) == ".parquet"}
    return ".tar" in kinds or (".parquet" in kinds and stems.isdisjoint(names))


def find_shards(places: Sequence[str], flag: str) -> list[Shard]:
    """Return the shards that a user names, each once: in the order given, folders and globs in natural order.

    Args:
        places: files, folders, globs and URLs of them, with or without braces.
        flag: for messages.

    Raises:
        UsageError: something is not there, or is no shard.
        CaptionTrainError: a place cannot be reached.
    """
    found: dict[str, Shard] = {}
    for place in places:
        for pattern in _expand(place):
            list_shards = _list_remote if is_url(pattern) else _list_local
            found |= {shard.place: shard for shard in list_shards(pattern, flag)}
    return list(found.values())


def _expand(place: str) -> Iterator[str]:
    if not is_url(place) and os.path.lexists(place):
        yield place  # The name of an existing file may have braces.
    else:
        yield from expand_braces(place)


def _list_local(pattern: str, flag: str) -> Iterator[Shard]:
    path = os.path.expanduser(pattern)  # noqa: PTH111 - Path raises for an unknown user
    if os.path.isdir(path):  # noqa: PTH112
        names = [f"{path.rstrip('/')}/{name}" for name in os.listdir(path)]  # noqa: PTH208
        names = keep_shards(names)
    elif os.path.lexists(path):
        names = [path]
    elif glob.has_magic(path):
        names = keep_shards(glob.glob(path, recursive=True))  # noqa: PTH207
    else:
        raise UsageError(f"{flag} {escape_unprintable(pattern)}: there is no such file or folder")
    _refuse_none(names, pattern, flag)
    for name in names:
        try:
            status = Path(name).stat()
        except OSError:
            yield Shard(name)  # Whoever opens it says what is wrong.
        else:
            yield Shard(name, f"{status.st_size} {status.st_mtime_ns}")


def _list_remote(pattern: str, flag: str) -> Iterator[Shard]:
    system, path, scheme = open_filesystem(pattern, flag)
    try:
        if glob.has_magic(path):
            names = keep_shards(system.glob(path))
        elif suffix_of(path):
            names = [path]
        else:
            names = keep_shards(system.ls(path, detail=False))
        names = [str(name) for name in names]
        _refuse_none(names, pattern, flag)
        for name in names:
            yield Shard(_complete_name(scheme, name), str(system.ukey(name)))
    except FileNotFoundError as error:
        raise UsageError(f"{flag} {escape_unprintable(pattern)}: there is no such file or folder") from error
    except CaptionTrainError:
        raise
    except Exception as error:
        raise CaptionTrainError(f"{flag} {escape_unprintable(pattern)}: {explain_remote(error)}") from error


def _complete_name(scheme: str, name: str) -> str:
    """Return the URL of what a file system calls by this name.

    >>> _complete_name("s3://", "bucket/a.tar"), _complete_name("memory://", "/bucket/a.tar")
    ('s3://bucket/a.tar', 'memory://bucket/a.tar')
    >>> _complete_name("file://", "/data/a.tar"), _complete_name("https://", "https://host/a.tar")
    ('file:///data/a.tar', 'https://host/a.tar')
    """
    if not scheme or is_url(name):
        return name
    return scheme + (name if scheme in ("file://", "local://") else name.lstrip("/"))


def open_filesystem(url: str, flag: str) -> tuple[Any, str, str]:
    """Return the file system of a URL, the path in it, and what stands before paths in URLs.

    Raises:
        UsageError: fsspec, or what it needs for the scheme, is not installed; or there is no such scheme.
    """
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{flag} {escape_unprintable(url)}: {explain_remote(error)}") from error
    # Plugins raise errors of many types where a bucket's credentials are missing.
    except Exception as error:
        raise UsageError(f"{flag} {escape_unprintable(url)}: {explain_remote(error)}") from error
    match = _SCHEME.match(url)
    return system, path, f"{match[1]}://" if match else ""


def explain_remote(error: BaseException) -> str:
    """Return the first line of what fsspec or one of its plugins says."""
    line = next(iter(str(error).splitlines()), "")
    return escape_unprintable(line)[:200] or type(error).__name__


def keep_shards(names: Sequence[str]) -> list[str]:
    """Return the shards among some files in natural order: tars if there are any, else Parquet files.

    Parquet files beside tars are img2dataset's tables of addresses.
    """
    by_kind: dict[str, list[str]] = {}
    for name in map(str, names):
        if (kind := suffix_of(name)) and not posixpath.basename(name).startswith("."):
            by_kind.setdefault(kind, []).append(name)
    found = by_kind.get(".tar") or by_kind.get(".parquet", [])
    return sorted(found, key=natural_key)


def _refuse_none(names: Sequence[str], pattern: str, flag: str) -> None:
    shown = escape_unprintable(pattern)
    if not names:
        raise UsageError(f"{flag} {shown}: no shards there, which end in {' or '.join(READERS)}")
    for name in names:
        if name.lower().endswith(PACKED_TARS):
            raise UsageError(f"{flag} {escape_unprintable(name)}: is compressed: unpack it to a .tar first")
        if not suffix_of(name):
            raise UsageError(
                f"{flag} {escape_unprintable(name)}: is no shard, which end in {' or '.join(READERS)}; "
                "caption images and shards by a command each"
            )


def open_shard(
    shard: Shard,
    path: Path | None = None,
    caption_extensions: Sequence[str] = (),
    names: Sequence[str] = ONE_CAPTION,
) -> ShardReader:
    """Return the reader of a shard.

    Args:
        shard: the shard.
        path: its copy on this machine, where it is remote.
        caption_extensions, names: as for ShardReader.

    Raises:
        ShardError: the file cannot be read.
    """
    return READERS[shard.kind](path or Path(shard.place), shard.place, caption_extensions, names)

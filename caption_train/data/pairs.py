"""Matches captions with images, and lists the files that are left over. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from caption_train.data.formats import CAPTION_SUFFIXES, natural_key, with_dot
from caption_train.data.scan import Folder
from caption_train.data.text import read_caption
from caption_train.errors import CaptionTrainError
from caption_train.system.console import escape_unprintable


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and its caption.

    Attributes:
        image: the image file.
        caption: the caption, on one line.
        source: where the caption was read: `a/b.txt` or `metadata.jsonl:12`.
        split: "train", "validation" or "test".
        prompt: what the model is asked for this caption; None means the prompt of the run.
        dataset: which of several datasets it is from, counted from 0.
    """

    image: Path
    caption: str
    source: str
    split: str = "train"
    prompt: str | None = None
    dataset: int = 0

    @property
    def texts(self) -> dict[str, str]:
        """The caption and, if there is one, the prompt, under their names in a collator's item."""
        return {"caption": self.caption} | ({"prompt": self.prompt} if self.prompt else {})


@dataclass
class Matches:
    """Images with their captions, and every file that did not become part of a pair.

    Attributes:
        pairs: the image's path relative to the dataset folder → pair.
        without_caption: images without a caption.
        without_image: caption files without an image.
        empty: files or entries whose caption is blank.
        shared: caption files that several images use, as `a.txt: a.png, a.jpg`.
        second: caption files not used because the image has another one that takes precedence.
        unreadable: caption files that cannot be read, each with the reason.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    without_caption: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    second: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def match_captions(
    folder: Folder,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    *,
    encoding: str = "utf-8",
    given: Mapping[str, tuple[str, str]] | None = None,
) -> Matches:
    """Match each image with its caption file; of several, `a.png.txt` wins over `a.txt`.

    >>> import tempfile
    >>> from caption_train.data.scan import scan_folder
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat.png", "dog.png", "owl.png"):
    ...     (folder / name).touch()
    >>> _ = (folder / "cat.txt").write_text("a cat")
    >>> _ = (folder / "dog.txt").write_text("a dog")
    >>> _ = (folder / "dog.png.txt").write_text("a dog in the rain")
    >>> _ = (folder / "fox.txt").write_text("a fox")
    >>> matches = match_captions(scan_folder(folder))
    >>> {name: pair.caption for name, pair in matches.pairs.items()}
    {'cat.png': 'a cat', 'dog.png': 'a dog in the rain'}
    >>> matches.without_caption, matches.without_image, matches.second
    (['owl.png'], ['fox.txt'], ['dog.txt'])

    Args:
        folder: the dataset folder, already scanned with the same `caption_extensions`.
        caption_extensions: endings of caption files; an earlier one wins over a later one.
        encoding: the encoding of the caption files.
        given: image → (caption, where it was read) for captions from elsewhere; they win over caption files.
    """
    texts, matches = match_texts(folder, caption_extensions, encoding=encoding, given=given)
    matches.pairs = {name: Pair(folder.root / name, *found) for name, found in texts.items()}
    return matches


def match_texts(
    folder: Folder,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    *,
    encoding: str = "utf-8",
    given: Mapping[str, tuple[str, str]] | None = None,
) -> tuple[dict[str, tuple[str, str]], Matches]:
    """Return image → (caption, where it was read), and what `match_captions` returns, with no pairs in it.

    Args:
        folder, caption_extensions, encoding, given: as in `match_captions`.
    """
    texts: dict[str, tuple[str, str]] = {}
    matches, given, start = Matches(), given or {}, f"{folder.root}/"
    extensions = [with_dot(extension) for extension in caption_extensions]
    used: dict[str, list[str]] = {}
    candidates: set[str] = set()
    for name in folder.images:
        stem = name[: name.rindex(".")]
        keys = [(base, extension) for extension in extensions for base in (name, stem)]
        found = [caption for key in keys for caption in folder.captions.get(key, ())]
        candidates.update(found)
        if name in given:
            caption, source = given[name]
        elif found:
            source = found[0]
            used.setdefault(source, []).append(name)
            try:
                caption = read_caption(start + source, encoding)
            except CaptionTrainError as error:
                matches.unreadable.append(str(error).removeprefix(f"{escape_unprintable(folder.root)}/"))
                continue
        else:
            matches.without_caption.append(name)
            continue
        if caption:
            texts[name] = (caption, source)
        else:
            matches.empty.append(source)
    matches.shared = [f"{caption}: {', '.join(names)}" for caption, names in used.items() if len(names) > 1]
    files = set(chain.from_iterable(folder.captions.values()))
    # A candidate lies beside an image. Those that no image uses lost to another candidate.
    matches.second = sorted(candidates - used.keys(), key=natural_key)
    matches.without_image = sorted(files - candidates, key=natural_key)
    return texts, matches

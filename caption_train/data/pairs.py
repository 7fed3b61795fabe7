"""Which caption belongs to which image, and what is left over. Standard library only."""

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
class Matches:
    """Images with their captions, and every file that did not make a pair.

    pairs: by the image's path relative to the dataset folder. empty: files, or entries, with a blank caption.
    shared: caption files of several images, `a.txt: a.png, a.jpg`. second: caption files another one goes
    before. unreadable: file and reason.
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
    """Pair each image with its caption: `a.png.txt` before `a.txt`, earlier extensions before later ones.

    given: image → (caption, source) read elsewhere; these go before caption files.
    """
    matches, given = Matches(), given or {}
    extensions = [with_dot(extension) for extension in caption_extensions]
    used: dict[str, list[str]] = {}
    candidates: set[str] = set()
    for name in folder.images:
        stem = name[: name.rindex(".")]
        keys = [(base, extension) for extension in extensions for base in (name, stem)]
        found = [caption for key in keys for caption in folder.captions.get(key, ())]
        candidates.update(found)
        if name in given:
            _add(matches, folder.root, name, *given[name])
        elif found:
            used.setdefault(found[0], []).append(name)
            try:
                caption = read_caption(f"{folder.root}/{found[0]}", encoding)
            except CaptionTrainError as error:
                matches.unreadable.append(str(error).removeprefix(f"{escape_unprintable(folder.root)}/"))
            else:
                _add(matches, folder.root, name, caption, found[0])
        else:
            matches.without_caption.append(name)
    matches.shared = [f"{caption}: {', '.join(names)}" for caption, names in used.items() if len(names) > 1]
    files = set(chain.from_iterable(folder.captions.values()))
    matches.second = sorted(candidates - used.keys(), key=natural_key)
    matches.without_image = sorted(files - candidates, key=natural_key)
    return matches


def _add(matches: Matches, root: Path, name: str, caption: str, source: str) -> None:
    if caption:
        matches.pairs[name] = Pair(root / name, caption, source)
    else:
        matches.empty.append(source)

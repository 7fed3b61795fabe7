"""Writes captions to sinks: files beside the images, one common file, drawings. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.captioning.cleaning import clean_caption
from caption_train.config.captioning import CaptionOptions


@dataclass(frozen=True)
class Caption:
    """What is written for one image.

    Attributes:
        image: the image.
        text: its caption.
        answer: boxes or polygons in it, if any.
        remarks: keys of REMARKS.
    """

    image: Path
    text: str
    answer: Any = None
    remarks: Sequence[str] = ()


class Sink(ABC):
    """A place that captions are written to.

    Only the main process calls `open`, `find_lacking` and `finish`.

    Attributes:
        keeps_captions: whether a later run finds the captions there and skips their images.
        was_complete: whether logs say that a run that adds to captions had added to all of them.
    """

    keeps_captions = True
    was_complete = False

    @abstractmethod
    def open(self, images: Sequence[Path]) -> None:
        """Lock the place against other runs, and find what is there.

        images: all images of the run.

        Raises:
            UsageError: nothing can be written there.
            CaptionTrainError: another run is writing there.
        """

    @abstractmethod
    def find_lacking(self, images: Sequence[Path]) -> list[Path]:
        """Return those of these images that have no caption there; UsageError for one that cannot get any."""

    def pending(self, images: Sequence[Path]) -> list[Path]:
        """Open the place, and return the images that have no caption there; errors as of the two."""
        self.open(images)
        return self.find_lacking(images)

    def begin(self, images: Sequence[Path]) -> None:  # noqa: B027
        """Remember the captions that exist now. Every process calls this before its first caption."""

    @abstractmethod
    def read(self, image: Path) -> str:
        """Return the caption of an image that is not pending."""

    @abstractmethod
    def write(self, caption: Caption) -> Caption | None:
        """Write one caption, unless somebody else has written one since the run began: theirs stays.

        Returns:
            The caption that is there now, `caption` itself or theirs; None if theirs cannot be read.
        """

    def find_theirs(self, caption: Caption) -> Caption | None:
        """Return what somebody else has written in place of `caption` since the run began, if anything."""
        return None

    def finish(self, images: Sequence[Path], *, complete: bool = True) -> list[str]:
        """Write what is common to all processes.

        Args:
            images: all images of the run, which give the order of rows.
            complete: False if other processes may still add captions.

        Returns:
            The names of images whose caption somebody else has written since the run began.
        """
        return []

    def mark_added(self) -> None:  # noqa: B027
        """Write into all logs of a run that adds to captions that it is done."""

    def forget_added(self) -> None:  # noqa: B027
        """Delete these logs."""

    def close(self) -> None:  # noqa: B027
        """Allow other runs to write there."""


class Outputs:
    """All sinks of a run, as one process writes them.

    Args:
        sinks: the sinks. A caption that somebody else has written to one of them is copied to the others,
            unless captions are added to those that are there: then each sink goes on from its own.
        adds: whether they are.
    """

    def __init__(self, sinks: Sequence[Sink], *, adds: bool = False) -> None:
        self.sinks = list(sinks)
        self._adds = adds

    @property
    def exist(self) -> bool:
        """Whether captions are written to files; if not, they are only printed."""
        return any(sink.keeps_captions for sink in self.sinks)

    def open(self, images: Sequence[Path]) -> None:
        """Lock all sinks against other runs, and find what is there. Call it once, before writing.

        Raises:
            UsageError: a sink cannot be written; raised before any work is done.
            CaptionTrainError: another run is writing to a sink.
        """
        try:
            for sink in self.sinks:
                sink.open(images)
        except BaseException:
            self.close()
            raise

    def find_lacking(self, images: Sequence[Path]) -> list[Path]:
        """Return those of these images that have no caption, or all with `--overwrite`.

        A caption that only one of two sinks has is copied to the other.
        """
        if self.was_complete:
            return []
        lacking = {sink: set(sink.find_lacking(images)) for sink in self.sinks}
        kept = {sink: names for sink, names in lacking.items() if sink.keeps_captions}
        self._copy(images, kept)
        return [image for image in images if all(image in names for names in kept.values())]

    def begin(self, images: Sequence[Path]) -> None:
        """Remember the captions that exist now, before the first one is made."""
        for sink in self.sinks:
            sink.begin(images)

    def write(self, caption: Caption) -> bool:
        """Write one caption to all sinks; return False if somebody else has written one, which stays."""
        is_ours = True
        for sink in () if self._adds else self.sinks:
            if (theirs := sink.find_theirs(caption)) is not None:
                return self._write_theirs(theirs, sink)
        for sink in self.sinks:
            stands = sink.write(caption)
            if self._adds:
                is_ours = is_ours and stands is caption
            elif stands is None:
                return False
            elif stands is not caption:
                return self._write_theirs(stands, sink)
        return is_ours

    @property
    def was_complete(self) -> bool:
        """Whether logs say that a run that adds to captions had added to all of them."""
        return any(sink.was_complete for sink in self.sinks)

    def finish(self, images: Sequence[Path], *, complete: bool = True) -> list[str]:
        """Write what is common to all processes; arguments and result as in `Sink.finish`."""
        return [name for sink in self.sinks for name in sink.finish(images, complete=complete)]

    def close(self) -> None:
        """Allow other runs to write to the sinks."""
        for sink in self.sinks:
            sink.close()

    def _write_theirs(self, caption: Caption, holder: Sink) -> bool:
        for sink in self.sinks:
            if sink is not holder:
                sink.write(caption)
        return False

    def _copy(self, images: Sequence[Path], lacking: dict[Sink, set[Path]]) -> None:
        for image in images:
            missing = [sink for sink, names in lacking.items() if image in names]
            if 0 < len(missing) < len(lacking):
                text = next(sink for sink in lacking if sink not in missing).read(image)
                for sink in missing:
                    sink.write(Caption(image, text))


class KeyedOutputs:
    """The outputs of each prompt of a run: one, under the name "", or those that `--prompts` names."""

    def __init__(self, by_key: Mapping[str, Outputs]) -> None:
        self._by_key = by_key

    @property
    def exist(self) -> bool:
        """Whether captions are written to files; if not, they are only printed."""
        return any(outputs.exist for outputs in self._by_key.values())

    def open(self, images: Sequence[Path]) -> None:
        """Lock all outputs against other runs, and find what is there; errors as in `Outputs.open`."""
        try:
            for outputs in self._by_key.values():
                outputs.open(images)
        except BaseException:
            self.close()
            raise

    def find_lacking(self, images: Sequence[Path]) -> list[tuple[Path, str]]:
        """Return (image, key) for what has no caption of these images."""
        if any(outputs.was_complete for outputs in self._by_key.values()):
            return []
        lacking = {key: set(outputs.find_lacking(images)) for key, outputs in self._by_key.items()}
        return [(image, key) for image in images for key, names in lacking.items() if image in names]

    def begin(self, images: Sequence[Path]) -> None:
        """Remember the captions that exist now, before the first one is made."""
        for outputs in self._by_key.values():
            outputs.begin(images)

    def write(self, caption: Caption, key: str = "") -> bool:
        """Write one caption; return False if somebody else has written one, which stays."""
        return self._by_key[key].write(caption)

    def finish(self, images: Sequence[Path], *, complete: bool = True, done: bool = True) -> list[str]:
        """Write what is common to all processes; arguments and result as in `Sink.finish`.

        done: False if the same command, run again, would have something left to do.
        """
        kept = [n for o in self._by_key.values() for n in o.finish(images, complete=complete)]
        if done:
            # All logs say so before the first is gone: a kill between them is no run that has added nothing.
            sinks = [sink for outputs in self._by_key.values() for sink in outputs.sinks]
            for sink in sinks:
                sink.mark_added()
            for sink in sinks:
                sink.forget_added()
        return list(dict.fromkeys(kept))

    def close(self) -> None:
        """Allow other runs to write to the sinks."""
        for outputs in self._by_key.values():
            outputs.close()


def finish_caption(text: str, options: CaptionOptions) -> str:
    """Return a generated text as a run writes it: `--clean`, then `--prefix`, `--suffix` and `--trigger`."""
    text = clean_caption(text, options.clean)
    return wrap_caption(text, prefix=options.prefix, suffix=options.suffix, trigger=options.trigger)


def wrap_caption(text: str, *, prefix: str = "", suffix: str = "", trigger: str | None = None) -> str:
    """Add prefix, suffix and trigger word to a caption.

    >>> wrap_caption("a cat", prefix="photo of ", trigger="mystyle")
    'mystyle, photo of a cat'
    >>> wrap_caption("a mystyle cat", trigger="mystyle")
    'a mystyle cat'

    Args:
        text: the caption.
        prefix: put before it, without a space.
        suffix: put after it, without a space.
        trigger: put first with a comma, unless it is a word of the text already.
    """
    text = f"{prefix}{text}{suffix}".strip()
    if not trigger or f" {trigger} " in f" {text.replace(',', ' ')} ":
        return text
    return f"{trigger}, {text}" if text else trigger

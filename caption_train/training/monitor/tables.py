"""Shows captions in the trackers as report.html does: picture, reference, caption before training and now."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caption_train.data.images import ImageError, open_image
from caption_train.reporting.markdown import join_cells
from caption_train.system.console import escape_unprintable
from caption_train.training.monitor.report import Key, RunReport
from caption_train.training.run.run import TrainingRun

VALIDATION, PREVIEWS = "captions", "samples"
"""The names of tables. Previews' pictures are in TensorBoard already, as `samples/0`, … at each preview."""
MOST_ROWS = 32
LARGEST_SIDE = 256
COLUMNS = ("file", "reference", "before training", "now")
STAGING = "WANDB_DATA_DIR"


@dataclass(frozen=True)
class TableRow:
    """A row of a table. picture: small, None where there is none or it is to stay here."""

    picture: Image.Image | None
    file: str
    reference: str
    before: str
    now: str

    @property
    def texts(self) -> list[str]:
        """The cells below COLUMNS."""
        texts = (escape_unprintable(self.file), self.reference, self.before, self.now)
        # A tracker's records are UTF-8, and a caption from JSON may hold half a character.
        return [text.encode("utf-8", "backslashreplace").decode() for text in texts]


class CaptionTables:
    """Logs tables of captions to the trackers of a run, with its main process alone.

    TensorBoard's tables are Markdown, with the pictures beside them as images `NAME/0`, `NAME/1`, …, once for
    each start of the run, since they do not change. wandb's have the pictures in their first column.

    Args:
        run: the run.
        report: what knows the captions of before training, after a resume too.
    """

    def __init__(self, run: TrainingRun, report: RunReport) -> None:
        self.run, self.report = run, report
        self._before: dict[Key, str] = {}
        self._pictures: dict[Key, Image.Image | None] = {}
        self._drawn = {PREVIEWS}

    def write(
        self, name: str, step: int, captions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]
    ) -> None:
        """Log a table of a step.

        Args:
            name: VALIDATION or PREVIEWS.
            step: the optimizer step, 0 before training.
            captions: what the model says now; the first MOST_ROWS of them are shown, in the order of:
            references: what it should say, for each image and prompt that may be shown.
        """
        trackers = self.run.accelerator.trackers if self.run.accelerator.is_main_process else ()
        keys = [key for key in references if key in captions][:MOST_ROWS]
        if not trackers or not keys:
            return
        before = self.report.find_captions(0)
        for key in keys:
            self._before.setdefault(key, captions[key] if step == 0 else before.get(key, ""))
        rows = [
            TableRow(
                self._find_picture(key),
                key[0].name,
                " / ".join(references[key]),
                self._before[key],
                captions[key],
            )
            for key in keys
        ]
        for tracker in trackers:
            if tracker.name == "tensorboard":
                write_markdown(tracker.writer, name, step, rows, with_pictures=name not in self._drawn)
            elif tracker.name == "wandb":
                write_wandb_table(tracker.run, name, step, rows)
        self._drawn.add(name)

    def _find_picture(self, key: Key) -> Image.Image | None:
        if self.run.options.log_no_images:
            return None
        if key not in self._pictures:
            try:
                picture = open_image(key[0])
                picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), reducing_gap=3.0)
            except ImageError:
                picture = None
            self._pictures[key] = picture
        return self._pictures[key]


def write_markdown(
    writer: Any, name: str, step: int, rows: Sequence[TableRow], *, with_pictures: bool
) -> None:
    """Log a table to TensorBoard; its first column is the number of the row's picture."""
    lines = [join_cells(["", *COLUMNS]), "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [join_cells([str(number), *row.texts]) for number, row in enumerate(rows)]
    writer.add_text(name, "\n".join(lines), step)
    for number, row in enumerate(rows):
        if with_pictures and row.picture is not None:
            writer.add_image(f"{name}/{number}", np.asarray(row.picture), step, dataformats="HWC")
    writer.flush()


def write_wandb_table(run: Any, name: str, step: int, rows: Sequence[TableRow]) -> None:
    """Log a table to wandb, with a column of pictures if there are any."""
    import wandb

    with _staging_in(Path(run.dir).parent):
        if any(row.picture for row in rows):
            pictures = [row.picture and wandb.Image(row.picture, file_type="jpg") for row in rows]
            cells = [[picture, *row.texts] for picture, row in zip(pictures, rows, strict=True)]
            table = wandb.Table(columns=["image", *COLUMNS], data=cells)
        else:
            table = wandb.Table(columns=list(COLUMNS), data=[row.texts for row in rows])
        run.log({name: table}, step=step)


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """Keep the copies of a table's pictures that wandb uploads from in a folder, unless that is chosen.

    Otherwise they are in the home folder, for good where the run is offline.
    """
    if STAGING in os.environ:
        yield
        return
    os.environ[STAGING] = str(folder)
    try:
        yield
    finally:
        del os.environ[STAGING]

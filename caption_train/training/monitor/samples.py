"""Captions a few fixed images during training, as a preview beside their references."""

import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image
from rich.table import Table

from caption_train.data.images import ImageError, open_image
from caption_train.data.pairs import Pair
from caption_train.data.split import pick_images
from caption_train.families.base import Family
from caption_train.system.console import print_rich
from caption_train.training.distributed.fsdp import unsharded
from caption_train.training.monitor.log import RunLog, Sample
from caption_train.training.monitor.tables import PREVIEWS, CaptionTables
from caption_train.training.monitor.validation import caption_items, open_item
from caption_train.training.run.batch_plan import is_due
from caption_train.training.run.data import TrainingData
from caption_train.training.run.run import TrainingRun

COUNT = 4


class PreviewCaptioner:
    """Captions the same few images before the first step and every `--sample_every_n_…`.

    They are validation images, chosen by their content. Without validation, they are training images, and the
    title says so. They are kept in memory, so that a run does not stop when a file disappears.
    """

    def __init__(
        self,
        run: TrainingRun,
        family: Family,
        data: TrainingData,
        log: RunLog,
        tables: CaptionTables,
    ) -> None:
        pairs, self.note = data.validation, ""
        if not pairs:
            pairs, self.note = data.train, " (images that are trained on: --validation_split holds some out)"
        self.run, self.family, self.log, self.tables = run, family, log, tables
        self.images: list[tuple[Pair, Image.Image]] = []
        self.items: list[dict[str, Any]] = []
        self.first: list[Sample] = []
        self.latest: list[Sample] = []
        options = run.options
        self.wanted = bool(options.sample_every_n_steps or options.sample_every_n_epochs)
        chosen = pick_images(pairs, options.seed)[:COUNT] if self.wanted else []
        for pair in (pairs[place] for place in chosen):
            try:
                item, image = open_item(run, pair.image), open_image(pair.image)
            except ImageError:
                continue
            self.items.append(item)
            self.images.append((pair, image))

    def before_first_step(self) -> None:
        """Caption with the untrained model if previews were asked for, to compare the later ones with."""
        if self.wanted:
            self.sample(0)

    def after_step(self, step: int) -> None:
        """Caption if it is due after this 0-based optimizer step."""
        options, plan, done = self.run.options, self.run.plan, step + 1
        ends_epoch = done % plan.steps_per_epoch == 0
        if is_due(options.sample_every_n_steps, done) or (
            ends_epoch and is_due(options.sample_every_n_epochs, plan.epoch_of(step))
        ):
            self.sample(done)

    def sample(self, step: int) -> None:
        """Caption the images, print and log the captions; the random state of training is not changed."""
        pairs, images = [pair for pair, _ in self.images], [image for _, image in self.images]
        with unsharded(self.run.model):
            if not self.run.accelerator.is_main_process:
                return
            captions = caption_items(self.run, self.family, self.items, [pair.prompt for pair in pairs])
        samples = [
            Sample(pair.image.name, image, pair.caption, caption)
            for pair, image, caption in zip(pairs, images, captions, strict=True)
        ]
        print_samples(f"samples at step {step}{self.note}", samples)
        self.first = self.first or (samples if step == 0 else [])
        self.latest = samples
        self.log.write_samples(step, samples, with_images=not self.run.options.log_no_images)
        keys = [(pair.image, pair.prompt or self.run.record.prompt) for pair in pairs]
        found = dict(zip(keys, captions, strict=True))
        self.tables.report.update(step, found)
        self.tables.write(
            PREVIEWS, step, found, {key: [pair.caption] for key, pair in zip(keys, pairs, strict=True)}
        )


def print_samples(title: str, samples: Sequence[Sample]) -> None:
    """Print a table of file, reference and generated caption."""
    table = Table("file", "reference", "generated", title=title, title_justify="left")
    for sample in samples:
        table.add_row(*(textwrap.shorten(t, 160) for t in (sample.file, sample.reference, sample.generated)))
    print_rich(table)

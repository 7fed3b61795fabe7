"""Holds the parts of one training run, which loop, saver and previews share."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from caption_train.adapters.record import TrainingRecord
from caption_train.config.training import TrainOptions
from caption_train.families.base import Batch
from caption_train.features.source import Keeping
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.run.batch_plan import BatchPlan


@dataclass
class TrainingRun:
    """Everything that was prepared for a run. Plan and loader start at the step in `progress`.

    keeping: the features of `--cache_features`.
    random_states: of each process at that step, restored when the loop starts; None at step 0.
    """

    options: TrainOptions
    record: TrainingRecord
    accelerator: Accelerator
    model: PreTrainedModel
    processor: ProcessorMixin
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    plan: BatchPlan
    train_dataloader: DataLoader
    keeping: Keeping | None = None
    progress: Progress = field(default_factory=Progress)
    random_states: list[dict[str, Any]] | None = None

    def encoding(self, batch: Batch) -> AbstractContextManager[Batch]:
        """Yield a batch for the model; with `--cache_features`, its images are encoded as it says."""
        return self.keeping.encoder.given(batch) if self.keeping else nullcontext(batch)

"""Captions with the model in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from caption_train.captioning.batches.grouping import in_first_order, order_by_length
from caption_train.captioning.batches.size import BatchSize
from caption_train.captioning.batches.stream import caption_stream
from caption_train.captioning.engines.engine import Engine
from caption_train.captioning.engines.graphs import DecodeGraphs
from caption_train.captioning.generate import (
    CaptionRun,
    caption_images,
    find_dtype,
    load_captioner,
    make_generation,
)
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.errors import UsageError
from caption_train.system.devices import choose_device
from caption_train.system.memory import pausing_garbage_collection


class LocalEngine(Engine):
    """The model on a device of this process, of which torchrun may have started several."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.device = choose_device(
            self.options.device, local_rank=self.processes.local_rank, processes=self.processes.count
        )
        if self.options.cuda_graphs and self.device.type != "cuda":
            raise UsageError(
                f"--cuda_graphs: needs an NVIDIA GPU, and this runs on {self.device}: leave it out"
            )
        # Across chunks: what did not fit once is not tried again.
        self._batch_size = BatchSize(self.options.batch_size, self.device)
        self._graphs: DecodeGraphs | None = None
        self._loaded: tuple[Any, Any] | None = None

    def describe(self) -> str:
        """Return model, device and precision."""
        precision = str(find_dtype(self.options, self.device)).removeprefix("torch.")
        quantized = f", the base in {self.options.quantize}" if self.options.quantize else ""
        return f"{self.name_model()} on {self.device} in {precision}{quantized}"

    def open(self) -> list[str]:
        """Load the model; see `Engine.open`."""
        # It imports transformers and PEFT.
        with pausing_garbage_collection():
            model, processor = load_captioner(self.family, self.base, self.options, self.device)
        self._loaded = model, processor
        self._graphs = DecodeGraphs(model) if self.options.cuda_graphs else None
        return self.family.describe_inputs(processor)

    def stream(self, tasks: Iterable[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Caption; see `Engine.stream`."""
        workers = self.options.num_workers
        if workers == "auto":
            workers = self._batch_size.choose_workers(None)
        run = CaptionRun(
            *(self.family, *self._loaded, make_generation(self.options, self.base.prompt)),
            *(workers, self.options.worker_timeout),
            keeping=None,
            graphs=self._graphs,
            draft=self.options.draft_decode,
        )
        return caption_stream(run, tasks, self._batch_size)

    def caption(self, tasks: Sequence[Task]) -> Iterator[CaptionResult | Unreadable]:
        """Caption; see `Engine.caption`."""
        if not self.options.group_by_length:
            return self._caption(tasks)
        _, processor = self._loaded
        order = order_by_length(self.family, processor, tasks, self._batch_size.most)
        return in_first_order(self._caption([tasks[place] for place in order]), order)

    def _caption(self, tasks: Sequence[Task]) -> Iterator[CaptionResult | Unreadable]:
        return caption_images(
            self.family,
            *self._loaded,
            [task.image for task in tasks],
            make_generation(self.options, self.base.prompt),
            batch_size=self._batch_size,
            num_workers=self.options.num_workers,
            worker_timeout=self.options.worker_timeout,
            prompts=[task.prompt for task in tasks],
            graphs=self._graphs,
            draft=self.options.draft_decode,
        )

"""Estimates the memory of a run, and finds the cheapest flags with which it fits a budget.

Weights, gradients and optimizer state are counted from shapes. Activations are measured in a forward pass
that keeps none of them, so estimating needs little more memory than the weights.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from caption_train.adapters.quantization import HEADS
from caption_train.config.compatibility import check
from caption_train.config.training import TrainOptions
from caption_train.training.memory.activations import Activations
from caption_train.training.memory.savers import MemorySaver, find_savers
from caption_train.training.optim.state_size import count_gradients, count_state, find_embeddings

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: 4 bits, an 8-bit scale for every 64 weights, a 32-bit one for every 256 of those."""
HALF = ("bf16", "fp16")
KEPT = 0.4
"""Freed memory that glibc keeps on a CPU, as a share of all activations, recomputed ones included;
measured by benchmarks/plan.py."""
MAPPED = 2**25
"""Allocations of this many bytes or more have their own pages, which return to the system when freed."""
MARGIN = 1.2
"""A run may need this many times its estimate (benchmarks/plan.py); flags fit only if so much is there."""
SAME_SIZE = 0.05
"""Weights within this share of their file's size have its dtype: only LoRA and buffers differ."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run holds in memory, in bytes.

    Attributes:
        libraries: the process without a model, on a CPU.
        loading: while the checkpoint is read.
        weights: all weights.
        gradients: all gradients.
        state: the optimizer's state.
        activations: kept for the backward pass.
        kept: freed memory that the C library keeps until the optimizer step.
        first_gradient: the largest gradient. That of word embeddings which are also the head appears first.
        stepping: temporary tensors of the optimizer step.
        accumulates: whether gradients of several micro-batches are added up.
    """

    libraries: int
    loading: int
    weights: int
    gradients: int
    state: int
    activations: int
    kept: int
    first_gradient: int
    stepping: int
    accumulates: bool

    @property
    def peak(self) -> int:
        """The most bytes held at once. Activations are freed as gradients come, unless these exist before."""
        passing = self.activations + self.kept + self.first_gradient
        passing = passing + self.gradients if self.accumulates else max(passing, self.gradients)
        held = self.weights + self.state + max(passing, self.gradients + self.stepping)
        return self.libraries + max(self.loading, held)

    def fits(self, budget: int) -> bool:
        """Tell whether a run fits even if the estimate is as low as the worst one that was measured."""
        return self.peak * MARGIN <= budget


class Planner:
    """Estimates runs of one model, which is trainable as `--train_method` says and not quantized.

    Args:
        model: the model.
        parts: the family's parts, name → pattern of module names.
        activations: of one image: in full precision ("no"), in half precision ("bf16"), and with half
            precision in only those weights that would be quantized ("quantized").
        libraries: bytes of the process without a model.
        file: bytes of the checkpoint, which a process on a CPU also holds while reading it.
        device: the type of device that the run is for.
        processes: how many processes train together.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, str],
        activations: Mapping[str, Activations],
        *,
        libraries: int = 0,
        file: int = 0,
        device: str = "cpu",
        processes: int = 1,
    ) -> None:
        self.model = model
        self.parts = parts
        self.activations = activations
        self.libraries = libraries
        self.file = file
        self.device = device
        self.processes = processes
        self.embeddings = find_embeddings(model)

    def plan(self, options: TrainOptions) -> MemoryEstimate:
        """Return what a run with these options holds in memory."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = count_gradients(options, trained)
        # DistributedDataParallel holds all gradients twice: also in the buckets that it sends.
        buckets = gradients if self.processes > 1 and not options.accumulation_compression else 0
        weights = self.count_weights(options)
        # Weights in the file's dtype are mapped from the file. In another dtype they are copies beside it.
        is_copied = abs(weights - self.file) > SAME_SIZE * self.file
        return MemoryEstimate(
            libraries=self.libraries,
            loading=weights + (self.file if is_copied else 0),
            weights=weights,
            gradients=gradients + buckets,
            state=count_state(options, trained, self.embeddings),
            activations=self._count_activations(options),
            kept=self._count_kept(options),
            first_gradient=4 * max((p.numel() for p in trained), default=0),
            stepping=self._count_stepping(options, trained),
            accumulates=options.gradient_accumulation_steps > 1,
        )

    def find_cheapest(
        self, options: TrainOptions, budget: int
    ) -> tuple[TrainOptions, MemoryEstimate, list[str]]:
        """Find the cheapest savers with which a run fits.

        Args:
            options: the options of the run.
            budget: bytes of memory.

        Returns:
            Changed options, their estimate, and the flags that were added. If nothing fits, these are the
            options with the smallest peak, which is then above the budget.
        """
        candidates = []
        savers = [saver for saver in find_savers(options) if saver.cost is not None]
        for chosen in _subsets(sorted(savers, key=lambda saver: saver.cost)):
            changed = replace(options, **{k: v for saver in chosen for k, v in saver.changes.items()})
            if not check(changed, device=self.device):
                candidates.append((sum(saver.cost for saver in chosen), self.plan(changed), changed, chosen))
        fitting = [candidate for candidate in candidates if candidate[1].fits(budget)]
        if fitting:
            _, plan, changed, chosen = min(fitting, key=lambda c: (c[0], c[1].peak))
        else:
            _, plan, changed, chosen = min(candidates, key=lambda c: (c[1].peak, c[0]))
        return changed, plan, [saver.flags for saver in chosen]

    def _count_activations(self, options: TrainOptions) -> int:
        is_half = options.mixed_precision in HALF
        kind = find_kind(options)
        checkpointing = options.gradient_checkpointing or options.activation_checkpointing
        held = self.activations[kind].held(checkpointing=checkpointing) * options.batch_size
        if checkpointing and is_half and options.train_method == "full":
            # Autocast keeps a half-precision copy of every weight until the forward pass is over.
            copies = sum(2 * p.numel() for p in self.model.parameters() if p.requires_grad and p.dim() > 1)
            inputs = self.activations[kind].held(checkpointing=True, recomputing=False) * options.batch_size
            held = max(held, inputs + copies)
        return int(held)

    def _count_kept(self, options: TrainOptions) -> int:
        if self.device != "cpu":
            return 0
        sizes = [size * options.batch_size for size in self.activations[find_kind(options)].tensors]
        if options.gradient_checkpointing or options.activation_checkpointing:
            # A block's tensors are freed before the next block runs; large ones return to the system at once.
            sizes = [size for size in sizes if size < MAPPED]
        return int(KEPT * sum(sizes))

    def _count_stepping(self, options: TrainOptions, trained: Sequence[nn.Parameter]) -> int:
        """Return the bytes of temporary tensors for the largest weight. AdamW is fused and needs none."""
        largest = max((p.numel() for p in trained), default=0)
        if options.optimizer_name == "Flora":
            # The update and the decompressed momentum; also the gradient, if it was compressed.
            return (12 if options.accumulation_compression else 8) * largest
        if options.optimizer_name.endswith("8bit") and self.device == "cpu":
            # In float32: both moments, the gradient, two parts of the update. On a GPU, one kernel does all.
            return 20 * largest
        return 0

    def count_weights(self, options: TrainOptions) -> int:
        """Return the bytes of all weights with `--quantize`, `--dtype` and `--mixed_precision` applied."""
        is_lora = options.train_method == "lora"
        auto = 2 if is_lora and options.mixed_precision in HALF else 4
        frozen = {"float32": 4, "bfloat16": 2, "float16": 2}.get(options.dtype, auto)
        if options.quantize:
            frozen = 4
        quantized = find_quantized(self.model, self.parts, options)
        total = 0.0
        for p in self.model.parameters():
            if p.requires_grad and is_lora:
                total += 4 * p.numel()
            elif p not in quantized:
                total += frozen * p.numel()
            elif options.quantize == "4bit":
                total += NF4_BYTES * p.numel()
            else:
                total += p.numel() + 4 * p.shape[0]
        return int(total)


def find_kind(options: TrainOptions) -> str:
    """Return which of a planner's activations a run with these options has."""
    if options.mixed_precision not in HALF:
        return "no"
    return "bf16" if options.quantize is None else "quantized"


def find_quantized(model: nn.Module, parts: Mapping[str, str], options: TrainOptions) -> set[nn.Parameter]:
    """Return the weights that `--quantize` packs, in the parts that it applies to."""
    if options.quantize is None:
        return set()
    names = options.quantize_parts or parts
    kept = [pattern for name, pattern in parts.items() if name not in names]
    found = set()
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        is_kept = plain.endswith(HEADS) or any(re.fullmatch(pattern, plain) for pattern in kept)
        if isinstance(module, nn.Linear) and ".lora_" not in name and not is_kept:
            found.add(module.weight)
    return found


def _subsets(savers: Sequence[MemorySaver]) -> Iterator[tuple[MemorySaver, ...]]:
    """Yield every choice of savers in which no two set the same flag."""
    for count in range(len(savers) + 1):
        for chosen in itertools.combinations(savers, count):
            names = [name for saver in chosen for name in saver.changes]
            if len(names) == len(set(names)):
                yield chosen

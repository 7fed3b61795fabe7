"""Lists which flags cannot be combined; all other combinations are supported and tested. No torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

PRINCIPAL = ("pissa", "pissa_niter_16", "olora")
"""Values of `--init_lora_weights` that subtract a part from the base's weights."""
SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}
"""Kinds of parallelism in which each process holds only a shard, and their names in messages."""


@dataclass(frozen=True)
class Setup:
    """The settings of a run that may exclude each other.

    device, precision and distributed are None while only the flags are known.
    """

    optimizer_name: str
    accumulation_compression: bool
    gradient_checkpointing: bool
    activation_checkpointing: bool
    quantize: str | None
    train_method: str
    dora: bool
    rslora: bool
    lora_plus_ratio: float | None
    init_lora_weights: str | None
    quantize_parts: Sequence[str]
    dtype: str
    device: str | None
    precision: str | None
    distributed: str | None = None
    auto_batch_size: bool = False
    init_adapter: Path | None = None
    cache_features: bool = False
    compile: bool = False
    train_parts: Sequence[str] = ()

    @property
    def sharded(self) -> str | None:
        """The name of the sharding that is used, or None."""
        return SHARDED.get(self.distributed)


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot work. The {fields} in `sentence` are replaced by those of the Setup."""

    applies: Callable[[Setup], bool]
    sentence: str


def _refuse_without_lora(flag: str, shown: str = "") -> Refusal:
    return Refusal(
        lambda s: getattr(s, flag) not in (None, False) and s.train_method == "full",
        f"--{flag}{shown} cannot be combined with --train_method full, which has no LoRA: drop one of them",
    )


REFUSALS = (
    Refusal(
        lambda s: s.accumulation_compression and s.optimizer_name != "Flora",
        "--accumulation_compression cannot be combined with --optimizer_name {optimizer_name}: "
        "FloraAccelerator steps one decompressed gradient at a time, which only Flora can; "
        "use --optimizer_name Flora",
    ),
    Refusal(
        lambda s: s.activation_checkpointing and not s.accumulation_compression,
        "--activation_checkpointing (-ac) is done by the FloraAccelerator: add --accumulation_compression "
        "and --optimizer_name Flora, or use --gradient_checkpointing, which goes with every optimizer",
    ),
    Refusal(
        lambda s: s.accumulation_compression and s.precision == "fp16",
        "--accumulation_compression cannot be combined with --mixed_precision fp16: its loss scaler looks "
        "for gradients that are already compressed; use --mixed_precision bf16",
    ),
    Refusal(
        lambda s: s.quantize is not None and s.train_method == "full",
        "--quantize {quantize} cannot be combined with --train_method full: quantized weights have no "
        "gradient; drop --quantize, or train a LoRA on the quantized base with --train_method lora",
    ),
    _refuse_without_lora("dora"),
    _refuse_without_lora("rslora"),
    Refusal(
        lambda s: s.dora and s.quantize == "8bit",
        "--dora cannot be combined with --quantize 8bit, whose weights cannot be read back to measure them: "
        "use --quantize 4bit, or drop --dora",
    ),
    _refuse_without_lora("lora_plus_ratio"),
    _refuse_without_lora("init_lora_weights", " {init_lora_weights}"),
    _refuse_without_lora("init_adapter", " {init_adapter}"),
    Refusal(
        lambda s: s.init_adapter is not None and s.init_lora_weights is not None,
        "--init_lora_weights {init_lora_weights} cannot be combined with --init_adapter, whose weights the "
        "LoRA starts from: drop one of them",
    ),
    Refusal(
        lambda s: s.init_lora_weights in PRINCIPAL and s.quantize is not None,
        "--init_lora_weights {init_lora_weights} cannot be combined with --quantize {quantize}: it changes "
        "the base's weights, which are rounded already; use --init_lora_weights eva, or drop --quantize",
    ),
    Refusal(
        lambda s: bool(s.quantize_parts) and s.quantize is None,
        "--quantize_parts says what --quantize is to quantize: add --quantize, or drop it",
    ),
    Refusal(
        lambda s: s.optimizer_name.startswith("Paged") and s.device == "cpu",
        "--optimizer_name {optimizer_name} moves its state between a GPU and the CPU, so it does not work on "
        "--device cpu: use --optimizer_name AdamW8bit",
    ),
    Refusal(
        lambda s: s.precision == "fp16" and s.device == "cpu",
        "--mixed_precision fp16 does not work on --device cpu: use --mixed_precision bf16",
    ),
    Refusal(
        lambda s: s.dtype == "float16" and s.train_method == "full",
        "--dtype float16 cannot be combined with --train_method full: its weights overflow and lose small "
        "updates; use --dtype float32 with --mixed_precision fp16, or --dtype bfloat16",
    ),
    Refusal(
        lambda s: s.precision == "fp8",
        "accelerate's configuration asks for fp8, which is not supported: use --mixed_precision bf16",
    ),
    Refusal(
        lambda s: s.distributed in SHARDED and s.optimizer_name != "AdamW",
        "--optimizer_name {optimizer_name} cannot be combined with {sharded}: it works on whole matrices, of "
        "which each process holds a part; use --optimizer_name AdamW, whose state is sharded too",
    ),
    Refusal(
        lambda s: s.distributed == "FSDP" and s.quantize is not None,
        "--quantize {quantize} cannot be combined with FSDP: packed weights cannot be cut; drop --quantize, "
        "or launch with plain data parallelism (--multi_gpu)",
    ),
    Refusal(
        lambda s: s.distributed == "FSDP" and s.init_lora_weights in PRINCIPAL,
        "--init_lora_weights {init_lora_weights} cannot be combined with FSDP: it is found from whole "
        "weights; drop it, or launch with plain data parallelism (--multi_gpu)",
    ),
    Refusal(
        lambda s: s.distributed in SHARDED and s.init_lora_weights == "eva",
        "--init_lora_weights eva cannot be combined with {sharded}: it changes weights that are shared out "
        "already; drop it, or launch with plain data parallelism (--multi_gpu)",
    ),
    Refusal(
        lambda s: s.distributed in SHARDED and s.precision == "fp16",
        "--mixed_precision fp16 cannot be combined with {sharded}, where its loss scaler is not tested: use "
        "--mixed_precision bf16",
    ),
    Refusal(
        lambda s: s.distributed == "DEEPSPEED" and s.dtype == "bfloat16" and s.train_method == "full",
        "--dtype bfloat16 cannot be combined with DeepSpeed and --train_method full: it trains a float32 "
        "copy of the weights, which no checkpoint holds; use --dtype float32 with --mixed_precision bf16",
    ),
    Refusal(
        lambda s: s.cache_features and "vision" in s.train_parts,
        "--cache_features keeps what a frozen vision tower makes of an image: leave vision out of "
        "--train_parts, or drop it",
    ),
    Refusal(
        lambda s: s.distributed in SHARDED and s.cache_features,
        "--cache_features cannot be combined with {sharded}: a process that knows all its images would leave "
        "the others waiting for its part of the vision tower; drop it, or launch with plain data parallelism "
        "(--multi_gpu)",
    ),
    Refusal(
        lambda s: s.compile and s.quantize is not None,
        "--compile cannot be combined with --quantize {quantize}: the compiler cannot see into quantized "
        "products, and gains nothing; drop one of them",
    ),
    Refusal(
        lambda s: s.compile and s.distributed in SHARDED,
        "--compile cannot be combined with {sharded}, where it is not tested: drop it, or launch with plain "
        "data parallelism (--multi_gpu)",
    ),
    Refusal(
        lambda s: s.distributed in SHARDED and s.auto_batch_size,
        "--auto_batch_size cannot be combined with {sharded}: a process that runs out of memory would leave "
        "the others waiting for its part; use a smaller --batch_size",
    ),
    Refusal(
        lambda s: s.distributed not in (None, "NO", "MULTI_CPU", "MULTI_GPU", *SHARDED),
        "accelerate's configuration asks for {distributed}, which is not supported: launch with plain data "
        "parallelism (--multi_gpu) or with --config_file examples/accelerate/fsdp.yaml",
    ),
)


def check(
    options: Any, *, device: str | None = None, precision: str | None = None, distributed: str | None = None
) -> list[str]:
    """Return a sentence for everything in `options` that cannot be combined.

    It is called with the flags alone before anything is imported, and again with what accelerate resolved,
    before the model is loaded.

    Args:
        options: TrainOptions.
        device: type of the device; by default the flag's.
        precision: mixed precision; by default the flag's.
        distributed: accelerate's name for the kind of parallelism.
    """
    flags = {
        field.name: getattr(options, field.name) for field in fields(Setup) if hasattr(options, field.name)
    }
    setup = Setup(
        **flags
        | {
            "device": device or (options.device or "").split(":")[0] or None,
            "precision": precision or options.mixed_precision,
            "distributed": distributed,
        }
    )
    found = [refusal.sentence for refusal in REFUSALS if refusal.applies(setup)]
    return [sentence.format(**vars(setup), sharded=setup.sharded) for sentence in found]


_PLAIN = Setup(
    optimizer_name="AdamW",
    accumulation_compression=False,
    gradient_checkpointing=False,
    activation_checkpointing=False,
    quantize=None,
    train_method="lora",
    dora=False,
    rslora=False,
    lora_plus_ratio=None,
    init_lora_weights=None,
    quantize_parts=(),
    dtype="auto",
    device="cuda",
    precision="no",
    distributed="NO",
)
_COMPRESSED = {"optimizer_name": "Flora", "accumulation_compression": True}
# Choice → (settings that it needs, which the other choice of a pair may override; settings that define it).
_CHOICES: dict[str, tuple[dict, dict]] = {
    "AdamW": ({}, {"optimizer_name": "AdamW"}),
    "AdamW8bit": ({}, {"optimizer_name": "AdamW8bit"}),
    "PagedAdamW, PagedAdamW8bit": ({}, {"optimizer_name": "PagedAdamW8bit"}),
    "Flora": ({}, {"optimizer_name": "Flora"}),
    "accumulation_compression": (_COMPRESSED, {"accumulation_compression": True}),
    "gradient_checkpointing": ({}, {"gradient_checkpointing": True}),
    "activation_checkpointing": (_COMPRESSED, {"activation_checkpointing": True}),
    "quantize 4bit": ({}, {"quantize": "4bit"}),
    "quantize 8bit": ({}, {"quantize": "8bit"}),
    "mixed_precision bf16": ({}, {"precision": "bf16"}),
    "mixed_precision fp16": ({}, {"precision": "fp16"}),
    "train_method full": ({}, {"train_method": "full"}),
    "dora": ({}, {"dora": True}),
    "rslora": ({}, {"rslora": True}),
    "lora_plus_ratio": ({}, {"lora_plus_ratio": 16.0}),
    "init_lora_weights pissa, olora": ({}, {"init_lora_weights": "pissa"}),
    "init_lora_weights gaussian": ({}, {"init_lora_weights": "gaussian"}),
    "init_lora_weights eva": ({}, {"init_lora_weights": "eva"}),
    "cache_features": ({}, {"cache_features": True}),
    "device cpu": ({}, {"device": "cpu"}),
    "several processes": ({}, {"distributed": "MULTI_GPU"}),
    "FSDP": ({}, {"distributed": "FSDP"}),
    "DeepSpeed": ({}, {"distributed": "DEEPSPEED"}),
}


def make_table() -> str:
    """Return all pairs of choices as a Markdown table, with the reasons of those that are refused."""
    reasons: list[Refusal] = []

    def verdict(row: str, column: str) -> str:
        (needs, sets), (other_needs, other_sets) = _CHOICES[row], _CHOICES[column]
        if row == column or any(sets[key] != other_sets[key] for key in sets.keys() & other_sets.keys()):
            return "·"
        setup = replace(_PLAIN, **{**needs, **other_needs, **sets, **other_sets})
        refusals = [refusal for refusal in REFUSALS if refusal.applies(setup)]
        reasons.extend(r for r in refusals if r not in reasons)
        return " ".join(f"no [{reasons.index(r) + 1}]" for r in refusals) or "yes"

    lines = ["| | " + " | ".join(_CHOICES) + " |", "|---" * (len(_CHOICES) + 1) + "|"]
    for row in _CHOICES:
        lines.append(f"| **{row}** | " + " | ".join(verdict(row, column) for column in _CHOICES) + " |")
    sentences = [re.sub(r"{\w+}", "…", reason.sentence) for reason in reasons]
    return "\n".join([*lines, "", *(f"{n}. {sentence}" for n, sentence in enumerate(sentences, 1))])


if __name__ == "__main__":
    print(make_table())

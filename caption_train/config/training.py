"""Defines the flags of the training scripts. Standard library only.

A field is a flag of the same name: its type parses the value, its metadata holds the help. `check()` returns
everything that is wrong, one line each, naming the flags.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config import compatibility
from caption_train.config.fields import CountOrAuto, flag
from caption_train.config.training_checks import find_problems
from caption_train.config.values import METRICS, PARTS

OPTIMIZERS = ("AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "Flora")
INITS = ("gaussian", "pissa", "pissa_niter_16", "olora", "eva")

_data = partial(flag, group="data")
_valid = partial(flag, group="validation")
_model = partial(flag, group="model")
_lora = partial(flag, group="LoRA")
_optim = partial(flag, group="optimization")
_memory = partial(flag, group="memory and precision")
_save = partial(flag, group="saving, samples and logs")


@dataclass(frozen=True)
class TrainOptions:
    """The flags of a training script. A family may have other defaults for some."""

    dataset_dir: Path = _data(
        None,
        "folder with metadata.jsonl, or with image/caption pairs; given again, one more",
        more="add_dataset",
    )
    output_dir: Path = _data(None, "save the LoRA to this folder")
    add_dataset: list[Path] = _data(
        [], "further datasets, as --dataset_dir given again", metavar="PATH", recorded="if given"
    )
    dataset_weights: list[int] = _data(
        [],
        "how often an epoch reads the images of each dataset, in their order (once if not given)",
        metavar="N",
        recorded="if given",
    )
    caption_extension: list[str] = _data(
        [".txt"], "caption files beside the images end in this; repeatable", repeated=True
    )
    follow_symlinks: bool = _data(False, "read images behind links that lead out of dataset_dir")
    max_length: int = _data(256, "longest caption in tokens, the end token included; longer ones are cut")
    shuffle_captions: bool = _data(False, "shuffle the comma-separated tags of a caption anew every epoch")
    keep_tokens: int = _data(0, "with --shuffle_captions, leave the first N tags in place")
    caption_dropout: float = _data(0.0, "probability of training on an empty caption")
    num_workers: CountOrAuto = _data(
        0,
        "processes that read and resize images ahead of the model (with a GPU up to 4, if not given); auto "
        "goes by cores and the size of the images",
    )
    worker_timeout: int = _data(
        600, "seconds to wait for a batch of --num_workers; 0 waits for ever", recorded=False
    )
    on_bad_data: str = _data(
        "stop",
        "list unusable rows and files and stop before training, or leave them out",
        choices=("stop", "skip"),
    )

    validation_split: float = _valid(
        0.0, "hold this fraction of the images out; identical ones stay together"
    )
    validation_dir: Path | None = _valid(None, "validate on this dataset instead")
    eval_every_n_epochs: int | None = _valid(
        None, "validate every N epochs (every epoch, with validation images)"
    )
    eval_every_n_steps: int | None = _valid(None, "validate every N optimizer steps")
    metrics: list[str] = _valid(
        [], f"score generated captions too: {', '.join(METRICS)} (COCO's, PTB-like tokens)"
    )
    metric_samples: int = _valid(64, "validation images to caption for --metrics, the same every time")
    metric_for_best: str = _valid("loss", "metric that ranks checkpoints", choices=("loss", *METRICS))
    early_stopping_patience: int | None = _valid(None, "stop after N validations in a row without a best")
    load_best_at_end: bool = _valid(False, "put the best checkpoint into output_dir, not the last one")

    model_id: str = _model(None, "model to train: a hub id or a folder")
    revision: str | None = _model(None, "branch, tag or commit of the model on the hub")
    cache_converted: bool = _model(False, "keep a native copy of a checkpoint in the legacy layout")
    prompt: str | None = _model(None, "text the model is given with every image")
    task: str | None = _model(None, "task token to train, instead of --prompt")
    preset: str | None = _model(None, "a prompt by its name, instead of --prompt", recorded="if given")
    system_prompt: str | None = _model(
        None,
        "what the model is told before every prompt (default: the checkpoint's own)",
        recorded="if given",
    )
    max_pixels: int | None = _model(
        None,
        "make images smaller that have more pixels (default: the checkpoint's, or 1048576)",
        recorded="if given",
    )
    device: str | None = _model(
        None, "device to run on, such as cuda, cuda:1, mps or cpu (found if not given)"
    )
    dtype: str = _model(
        "auto",
        "how the frozen base is held; auto is the mixed precision for LoRA, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )

    train_method: str = _lora("lora", "train a LoRA, or every weight", choices=("lora", "full"))
    rank: int = _lora(16, "rank of the LoRA")
    alpha: float = _lora(32, "alpha, which scales the LoRA by alpha / rank")
    dropout: float = _lora(0.05, "dropout of the LoRA")
    target_modules: list[str] = _lora([], "names, or ends of names, of the modules to train")
    rslora: bool = _lora(False, "scale by alpha / sqrt(rank) (rank-stabilized LoRA)")
    dora: bool = _lora(False, "learn each weight's magnitude beside its direction (DoRA); slower")
    init_lora_weights: str | None = _lora(
        None,
        "what the LoRA starts from: the base's main directions (pissa, olora), the data's (eva), or random "
        "(if not given)",
        choices=INITS,
    )
    init_adapter: Path | None = _lora(
        None,
        "go on from this LoRA on more or other data: its weights, rank and targets, a new schedule",
        recorded="if given",
    )
    lora_plus_ratio: float | None = _lora(
        None, "learning rate of every lora_B in units of lora_A's; LoRA+ suggests 16 (1 if not given)"
    )
    train_parts: list[str] = _lora(
        [], "parts to train: vision, projector, language; the rest is frozen (all if not given)"
    )

    learning_rate: float = _optim(1e-4, "peak learning rate")
    part_learning_rates: list[str] | None = _optim(
        None,
        "peak learning rates of single parts, such as vision=1e-5 (--learning_rate if not given)",
        metavar="PART=RATE",
        recorded="if given",
    )
    weight_decay: float = _optim(1e-4, "weight decay")
    batch_size: int = _optim(1, "images per process and micro-batch")
    gradient_accumulation_steps: int = _optim(1, "micro-batches per optimizer step")
    epochs: int = _optim(5, "passes over the dataset")
    group_by_length: bool = _optim(
        False, "make batches of captions of about one length: less padding", recorded="if given"
    )
    optimizer_name: str = _optim("AdamW", "optimizer", choices=OPTIMIZERS)
    scheduler: str = _optim(
        "OneCycle", "learning-rate schedule", choices=("OneCycle", "constant", "linear", "cosine")
    )
    warmup_steps: int = _optim(0, "optimizer steps of linear warm-up; OneCycle brings its own unless given")
    max_bad_steps: int = _optim(10, "stop after this many steps in a row with a loss or gradient not finite")
    max_grad_norm: float | None = _optim(None, "clip gradients to this norm (not clipped if not given)")
    optimizer_rank: int = _optim(16, "rank of Flora's compressed momentum")

    mixed_precision: str | None = _memory(
        None,
        "precision of the forward pass (default: as accelerate is set); auto is bf16 where the device itself "
        "computes in it",
        choices=("no", "fp16", "bf16", "auto"),
    )
    compile: bool = _memory(
        False,
        "compile the model's blocks with torch.compile: minutes at first, then faster steps; says when "
        "it has paid",
        recorded="if given",
    )
    gradient_checkpointing: bool = _memory(False, "recompute activations: less memory, slower")
    cache_features: bool = _memory(
        False,
        "keep what the frozen vision tower makes of each image on disk, so that it runs once an image; all "
        "other parts are trained",
        recorded="if given",
    )
    cache_limit: str | None = _memory(
        None,
        "how much disk the features of all runs may take, say, 50GB (if not given, half of what is free)",
        metavar="SIZE",
        recorded=False,
    )
    auto_batch_size: bool = _memory(
        False, "halve a batch that does not fit and accumulate more; the effective batch stays"
    )
    quantize: str | None = _memory(
        None, "hold the frozen base in 4-bit NF4 (or 8bit)", choices=("4bit", "8bit"), const="4bit"
    )
    quantize_parts: list[str] = _memory(
        [], "parts that --quantize quantizes: vision, projector, language (all if not given)"
    )
    accumulation_compression: bool = _memory(
        False, "compress accumulated gradients with FloraAccelerator (needs Flora)"
    )
    accumulation_rank: int = _memory(
        16, "rank of the compressed accumulation", aliases=("--accumulation-rank",)
    )
    activation_checkpointing: bool = _memory(
        False, "activation checkpointing together with FloraAccelerator", aliases=("-ac",)
    )
    rank_timeout: int = _memory(
        900,
        "with several processes, seconds to wait for one that does not answer before the others end",
        recorded=False,
    )
    plan: bool = _memory(False, "print what the run would hold in memory, and exit")
    memory_budget: str | None = _memory(
        None, "with --plan, find the cheapest flags that fit, say, 8GB", metavar="SIZE"
    )

    save_every_n_epochs: int | None = _save(None, "save a checkpoint every N epochs")
    save_every_n_steps: int | None = _save(None, "save a checkpoint every N optimizer steps")
    keep_last: int | None = _save(None, "keep the newest N checkpoints (all that were asked for)")
    resume: str | None = _save(
        None, "go on from a checkpoint folder, or from the newest undamaged one (auto)", metavar="auto|PATH"
    )
    resume_anyway: bool = _save(False, "with --resume, go on although data, base or settings changed")
    sample_every_n_epochs: int | None = _save(None, "caption sample images every N epochs")
    sample_every_n_steps: int | None = _save(None, "caption sample images every N optimizer steps")
    log_with: str | None = _save(None, "log to this tracker", choices=("all", "wandb", "tensorboard"))
    log_no_images: bool = _save(
        False, "send captions, but no images, to the trackers of --log_with", recorded="if given"
    )
    push_to_hub: str | None = _save(
        None,
        "upload what was trained, with its model card, to this repository of the hub (created private)",
        metavar="USER/NAME",
        recorded=False,
    )
    name: str | None = _save(None, "name of the run, in logs and at the start of checkpoint names")
    seed: int = _save(42, "seed of all random numbers")
    quiet: bool = _save(False, "print errors and results only", recorded=False)

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    @property
    def datasets(self) -> list[tuple[Path, int]]:
        """The dataset folders, each with how often an epoch reads it."""
        folders = [self.dataset_dir, *self.add_dataset]
        return list(zip(folders, self.dataset_weights or [1] * len(folders), strict=True))

    @property
    def unfrozen_parts(self) -> list[str]:
        """The parts that are trained if `--train_parts` is not given; empty for all."""
        return [part for part in PARTS if part != "vision"] if self.cache_features else []

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        return find_problems(self) + compatibility.check(self)

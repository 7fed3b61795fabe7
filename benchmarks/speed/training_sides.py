"""Training in three ways on the same model, LoRA, batches and random numbers: ours, Trainer, a plain loop."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.speed.sides import Gate

ENDLESS = 100_000
"""Epochs: a side is ended when it has been measured."""
RATE, CLIP = 1e-4, 1.0


def work(spec: dict[str, Any]) -> None:
    """Train until the parent has seen enough; answer after every step, with its loss."""
    SIDES[spec["side"]](spec, make_options(spec))


def make_options(spec: dict[str, Any]) -> Any:
    """Return the options of the run; `flags` of the specification are added to the family's defaults."""
    from caption_train.config.training import TrainOptions
    from caption_train.families import get_family

    given = {
        **get_family(spec["family"]).train_defaults,
        "dataset_dir": Path(spec["data"]),
        "output_dir": Path(tempfile.mkdtemp(prefix="speed-")) / "run",
        "model_id": spec["base"],
        "device": spec["device"],
        "mixed_precision": spec["precision"],
        "batch_size": spec["batch_size"],
        "epochs": ENDLESS,
        "learning_rate": RATE,
        "scheduler": "constant",
        "max_grad_norm": CLIP,
        "dropout": 0.0,
        "quiet": True,
        **spec.get("flags", {}),
    }
    return TrainOptions(**given, sources=dict.fromkeys(given, "argument"))


def make_gate(spec: dict[str, Any], device: Any) -> tuple[Gate, Callable[[float], None]]:
    """Return the gate, and what is called after each step with the loss.

    Each side seeds its random numbers with the step's number first, so that dropout falls alike.
    """
    import torch

    gate = Gate(device, torch.bfloat16 if spec["precision"] == "bf16" else torch.float32)
    gate.watch_loaders()

    def after_step(loss: float | None = None) -> None:
        gate.wait(**({} if loss is None else {"loss": loss}))

    return gate, after_step


def train_ours(spec: dict[str, Any], options: Any) -> None:
    """Train as the scripts do, data checks, log and all."""
    from accelerate.utils import set_seed

    from caption_train.families import get_family
    from caption_train.training.prepare import prepare_training

    trainer = prepare_training(options, get_family(spec["family"]))
    _, after_step = make_gate(spec, trainer.run.accelerator.device)
    update, steps = trainer.update, count(1)

    def update_and_wait(micro_batches: Any) -> tuple[float, float]:
        set_seed(next(steps))
        result = update(micro_batches)
        after_step(result[0])
        return result

    trainer.update = update_and_wait
    after_step()
    trainer.train()


@dataclass
class Parts:
    """What the other sides train: the same as ours.

    Attributes:
        model: the base with its LoRA, on the CPU.
        make_loader: makes the loader of the batches, in our order.
        device: the device that accelerate chose.
    """

    model: Any
    make_loader: Callable[[], Any]
    device: Any


def prepare_parts(spec: dict[str, Any], options: Any) -> Parts:
    """Load the model and the data as ours does, from the same seed."""
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader

    from caption_train.families import get_family
    from caption_train.training.distributed.accelerator import make_accelerator
    from caption_train.training.model import load_trainable, resolve_options
    from caption_train.training.run.batch_plan import BatchPlan
    from caption_train.training.run.batches import CaptionDataset
    from caption_train.training.run.data import read_training_data

    family = get_family(spec["family"])
    accelerator = make_accelerator(options)
    options, base = resolve_options(options, family)
    data = read_training_data(options, accelerator)
    set_seed(options.seed)
    model, processor = load_trainable(options, family, base.facts, accelerator)
    family.set_up(processor, options.model_id, base.settings, [base.prompt])
    collate = family.make_collator(processor, prompt=base.prompt, max_length=options.max_length)
    plan = BatchPlan(len(data.train), options.batch_size, epochs=ENDLESS, seed=options.seed)
    dataset = CaptionDataset(data.train, seed=options.seed)
    return Parts(
        model,
        lambda: DataLoader(
            dataset,
            batch_sampler=plan,
            collate_fn=collate,
            num_workers=4 if accelerator.device.type == "cuda" else 0,
            pin_memory=accelerator.device.type == "cuda",
        ),
        accelerator.device,
    )


def train_with_trainer(spec: dict[str, Any], options: Any) -> None:
    """Train with transformers.Trainer."""
    import transformers

    parts = prepare_parts(spec, options)
    _, after_step = make_gate(spec, parts.device)

    class Gated(transformers.TrainerCallback):
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            transformers.set_seed(state.global_step + 1)

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            after_step(trainer.seen.item())

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(parts.make_loader())

        def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().compute_loss(*arguments, **keywords)
            self.seen = (loss[0] if isinstance(loss, tuple) else loss).detach()
            return loss

    trainer = Trainer(
        parts.model,
        transformers.TrainingArguments(
            output_dir=str(options.output_dir),
            per_device_train_batch_size=options.batch_size,
            max_steps=ENDLESS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=options.weight_decay,
            max_grad_norm=CLIP,
            bf16=options.mixed_precision == "bf16",
            use_cpu=spec["device"] == "cpu",
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=options.seed,
        ),
        train_dataset=[0] * ENDLESS,
        callbacks=[Gated()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    after_step()
    trainer.train()


def train_in_a_loop(spec: dict[str, Any], options: Any) -> None:
    """Train with accelerate in the loop of its documentation."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    parts = prepare_parts(spec, options)
    _, after_step = make_gate(spec, parts.device)
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(mixed_precision=options.mixed_precision or "no", cpu=spec["device"] == "cpu")
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=options.weight_decay, fused=True)
    model, optimizer, loader = accelerator.prepare(parts.model, optimizer, parts.make_loader())
    model.train()
    after_step()
    for step, batch in enumerate(loader, 1):
        set_seed(step)
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.item())


SIDES = {"ours": train_ours, "Trainer": train_with_trainer, "accelerate loop": train_in_a_loop}

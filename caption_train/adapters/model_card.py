"""Writes what a saved LoRA or model says about itself: training.json and the model card. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caption_train.adapters.record import TRAINING_FILE, TrainingRecord
from caption_train.families import FAMILIES, get_family, name_script
from caption_train.system.files import write_atomically


def write_card(folder: Path, record: TrainingRecord, extra: Mapping[str, Any]) -> None:
    """Write training.json and README.md, a model card in the hub's format.

    Args:
        folder: the folder of the adapter or model.
        record: where it comes from.
        extra: further entries: step, epoch, loss.
    """
    write_atomically(folder / TRAINING_FILE, record.to_json(**extra))
    write_atomically(folder / "README.md", _card(record, extra))


def name_flag(train_method: str) -> str:
    """Return the inference scripts' flag for what this `--train_method` produces."""
    return "--peft_model" if train_method == "lora" else "--base_model"


def _card(record: TrainingRecord, extra: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    options = record.options
    is_lora = options["train_method"] == "lora"
    is_hub_id = not Path(record.base_model).is_absolute()
    front = ModelCardData(
        library_name="peft" if is_lora else "transformers",
        base_model=record.base_model if is_hub_id else None,
        pipeline_tag="image-to-text",
        tags=["image-captioning", record.family, *(["lora"] if is_lora else [])],
    )
    shown = ["rank", "alpha", "dropout"] if is_lora else []
    shown += ["learning_rate", "batch_size", "gradient_accumulation_steps", "epochs"]
    rows = [f"| {name} | {options[name]} |" for name in shown]
    rows += [f"| {name} | {value} |" for name, value in extra.items() if value is not None]
    script = name_script(record.family)
    base = f"--base_model {record.base_model} " if is_lora else ""
    hint = get_family(record.family).load_elsewhere if is_lora and record.family in FAMILIES else ""
    elsewhere = [hint.format(base=record.base_model), ""] if hint else []
    return "\n".join(
        [
            "---",
            front.to_yaml(),
            "---",
            "",
            f"# {options['name'] or ('Captioning LoRA' if is_lora else 'Captioning model')}",
            "",
            f"Captions images in the style of {record.dataset['pairs']} image/caption pairs. "
            f"Base: `{record.base_model}`. Prompt: `{record.prompt or 'none'}`. "
            f"{record.trainable_parameters:,} of {record.total_parameters:,} parameters were trained.",
            "",
            "```bash",
            f"python {script} {base}{name_flag(options['train_method'])} . --images path/to/images",
            "```",
            "",
            *elsewhere,
            "| | |",
            "|---|---|",
            *rows,
            "",
            "Made with caption-train " + record.versions["caption-train"] + ".",
            "",
        ]
    )

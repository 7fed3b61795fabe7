"""Writes what a saved LoRA or model says about itself: training.json and the model card. No torch."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caption_train.adapters.record import TRAINING_FILE, TrainingRecord
from caption_train.families import FAMILIES, get_family, name_script
from caption_train.system.files import read_json_object, write_atomically


def write_card(folder: Path, record: TrainingRecord, extra: Mapping[str, Any]) -> None:
    """Write training.json and README.md, a model card in the hub's format.

    Args:
        folder: the folder of the adapter or model.
        record: where it comes from.
        extra: further entries: step, epoch, loss.
    """
    write_atomically(folder / TRAINING_FILE, record.to_json(**extra))
    write_atomically(folder / "README.md", _card(record, extra))


@dataclass(frozen=True)
class Shown:
    """An image of the model card: its file below the card's folder, and its captions."""

    file: str
    reference: str
    before: str
    after: str


def add_results(
    folder: Path,
    record: TrainingRecord,
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    shown: Sequence[Shown] = (),
    report: str | None = None,
) -> None:
    """Write README.md anew, with validation results and sample captions.

    Args:
        folder: the folder of the finished adapter or model, with its training.json.
        record: where it comes from.
        before, after: results of the untrained and of the finished model, by name.
        shown: images with their captions.
        report: the file beside the card with curves and captions, if there is one.
    """
    training = read_json_object(folder / TRAINING_FILE)
    reached = {name: training.get(name) for name in ("global_step", "epoch", "loss")}
    sections = []
    if after:
        rows = [
            f"| {name} | {_number(before.get(name))} | {_number(value)} |" for name, value in after.items()
        ]
        sections += ["## Validation", "", "| | before training | after |", "|---|---|---|", *rows, ""]
    if shown:
        header = ["| | reference | before training | after |", "|---|---|---|---|"]
        rows = [
            f"| ![]({image.file}) | {_cell(image.reference)} | {_cell(image.before)} | {_cell(image.after)} |"
            for image in shown
        ]
        sections += ["## Samples", "", *header, *rows, ""]
    if report:
        sections += [f"[{report}]({report}) shows the curves and the captions of the validation images.", ""]
    write_atomically(folder / "README.md", _card(record, reached, sections))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    """Return a caption as it is, safe inside a cell of a Markdown table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def name_flag(train_method: str) -> str:
    """Return the inference scripts' flag for what this `--train_method` produces."""
    return "--peft_model" if train_method == "lora" else "--base_model"


def _card(record: TrainingRecord, extra: Mapping[str, Any], sections: Sequence[str] = ()) -> str:
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
            *sections,
            "Made with caption-train " + record.versions["caption-train"] + ".",
            "",
        ]
    )

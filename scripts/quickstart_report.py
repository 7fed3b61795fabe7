"""Compare what the base and the LoRA say of the held-out pictures; the last step of quickstart.sh."""

import json
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROWS = 6
WIDTH = 100
PICTURE = "captions.png"


def read_captions(path: Path) -> dict[str, str]:
    """Return what an inference script wrote to `--output`: file name → caption."""
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return {Path(row["file_name"]).name: row["text"] for row in rows}


def read_references(folder: Path) -> dict[str, str]:
    """Return the captions beside the pictures of a folder: file name → caption."""
    texts = {path.stem: path.read_text("utf-8").strip() for path in folder.glob("*.txt")}
    return {path.name: texts[path.stem] for path in sorted(folder.glob("*.[jp][pn]g"))}


def exact_match(references: dict[str, str], captions: dict[str, str]) -> float:
    """Return the share of pictures whose caption is the reference, character by character."""
    return sum(captions.get(name) == text for name, text in references.items()) / len(references)


def make_table(references: dict[str, str], base: dict[str, str], lora: dict[str, str]) -> Table:
    """Put a few pictures' captions side by side, evenly chosen; ✓ marks what equals the reference."""
    table = Table("picture", "base alone", "with the LoRA", "", width=WIDTH, show_lines=True)
    for name in list(references)[:: max(len(references) // ROWS, 1)][:ROWS]:
        mark = "✓" if lora[name] == references[name] else "✗"
        table.add_row(name, base[name], lora[name], mark)
    return table


def draw_captions(
    folder: Path, references: dict[str, str], base: dict[str, str], lora: dict[str, str], path: Path
) -> None:
    """Draw a few pictures of a folder with what base and LoRA say of them, evenly chosen."""
    from matplotlib.figure import Figure
    from PIL import Image

    names = list(references)[:: max(len(references) // ROWS, 1)][:ROWS]
    figure = Figure(figsize=(12, 8.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.2)
    places = figure.subplots(2, 3).flat[: len(names)]
    for axes, name in zip(places, names, strict=True):
        with Image.open(folder / name) as picture:
            axes.imshow(picture.convert("RGB"))
        lines = [("base", base[name], "tab:gray"), ("LoRA", lora[name], "black")]
        for place, (label, caption, colour) in enumerate(lines):
            text = "\n".join(textwrap.wrap(f"{label}: {caption}", 52)[:3])
            axes.text(
                0, -0.03 - 0.13 * place, text, transform=axes.transAxes, va="top", fontsize=9, color=colour
            )
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=80, format="png")


def main(argv: list[str]) -> None:
    """Print the comparison and write summary.json; argv: held-out folder, run folder, summary.json."""
    held_out, run, summary_path = map(Path, argv)
    references = read_references(held_out)
    base, lora = (read_captions(run / f"{name}.jsonl") for name in ("base", "lora"))
    trained = json.loads((run / "lora" / "summary.json").read_text("utf-8"))
    summary = {
        "family": run.name,
        "base_exact_match": exact_match(references, base),
        "lora_exact_match": exact_match(references, lora),
        "train_seconds": trained["train_seconds"],
        "images": len(references),
    }
    summary_path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw_captions(held_out, references, base, lora, run / PICTURE)
    console = Console(width=WIDTH, markup=False, highlight=False)
    console.print(make_table(references, base, lora))
    console.print(
        f"Exact match with the reference on {len(references)} held-out pictures: "
        f"{summary['base_exact_match']:.0%} with the base alone, {summary['lora_exact_match']:.0%} with the "
        f"LoRA, after {trained['train_seconds']:.0f} s of training.\n"
        f"Written to {summary_path}, with pictures to {run / PICTURE}.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])

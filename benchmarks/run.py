"""Measure speed: training, captioning, start-up, compiling, against what people would use instead.

python benchmarks/run.py                        true shapes on a CPU, into speed.json and RESULTS.md
python benchmarks/run.py --quick                small shapes, less than five minutes on two idle cores
python benchmarks/run.py --quick --check        fail where a ratio is 20 % below the committed one
python benchmarks/run.py --only frozen --list   name the rows; --only runs those that have one of the words

The machine should do nothing else. A run with --check writes nothing.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, Results
from benchmarks.speed.report import describe_machine, find_cpu_flags, find_falls, put_section, render
from benchmarks.speed.rows import (
    CAPTIONING,
    TRAINING,
    Effort,
    Row,
    make_captioning_row,
    make_frozen_row,
    make_training_row,
    measure_row,
)
from benchmarks.speed.startup import measure_compiling, measure_startup

Work = Callable[[], dict[str, dict[str, Any]]]
"""Measures one row or a few: name → result."""


def list_work(device: str, is_quick: bool, folder: Path, seconds: float | None = None) -> dict[str, Work]:
    """Return what there is to measure, by name.

    Args:
        device: `cpu` or `cuda`.
        is_quick: whether shapes are small and rounds few.
        folder: where bases and photos lie.
        seconds: how long a row is measured, if not as usual.
    """
    rows = list_gpu_rows() if device == "cuda" else list_rows(is_quick)
    usual = 8 if is_quick or device == "cuda" else 15
    work: dict[str, Work] = {}
    for row in rows:
        # A round of captioning is several images for each of up to five sides.
        effort = Effort(usual if seconds is None else seconds, least=3 if row.kind == "training" else 2)
        work[row.name] = partial(_measure_one, row.name, partial(measure_row, row, folder, device, effort))
    if device == "cpu":
        photos = 32 if is_quick else 64
        work["start-up"] = partial(measure_startup, folder, 2)
        work["compiling"] = partial(
            _measure_one, f"compiling {photos} photos", partial(measure_compiling, folder, 2, photos)
        )
    return work


def list_rows(is_quick: bool) -> list[Row]:
    """Return the rows with sides on a CPU."""
    # Where the processor has no products in bf16, they take several times as long as in float32.
    has_bf16 = {"avx512_bf16", "amx_bf16"} & set(find_cpu_flags())
    size, precision = ("small" if is_quick else "base"), ("bf16" if has_bf16 and not is_quick else "no")
    bases = [f"{family}-{size}" for family in ("blip", "florence")]
    rows = [
        make_training_row(bases[0], 2, precision),
        # Three sides of Florence-2-base take 23 GB.
        replace(make_training_row(bases[1], 2, precision), sides=TRAINING[: 3 if is_quick else 2]),
        *(make_frozen_row(base, 2, precision) for base in bases),
        # As many that starting the processes which read images is a small part.
        *(make_captioning_row(base, 16 if is_quick else 8) for base in bases),
    ]
    if not is_quick:
        large = make_training_row(bases[0], 2, precision, 4, megapixels=12)
        rows.append(replace(large, sides=large.sides[:2]))
        large = make_captioning_row(bases[0], 4, megapixels=12)
        rows.append(replace(large, sides=large.sides[:2]))
    return rows


def list_gpu_rows() -> list[Row]:
    """Return the rows on a GPU, whose shapes are always true."""
    bases = ("florence-large", "vlm-2b")
    return [
        *(make_training_row(base, 8, "bf16", photos=32) for base in bases),
        make_frozen_row("florence-large", 8, "bf16"),
        *(
            replace(make_captioning_row(base, 64, "bfloat16"), sides=(*CAPTIONING[:2], CAPTIONING[-1]))
            for base in bases
        ),
        replace(make_captioning_row(bases[0], 32), sides=CAPTIONING[:2]),
    ]


def _measure_one(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: measure()}


def run_work(work: dict[str, Work], keep: Callable[[str, dict[str, Any]], None]) -> dict[str, dict[str, Any]]:
    """Measure all, hand each row to `keep`, and return them; a row that fails has `error`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, measure in work.items():
        try:
            found = measure()
        except (RuntimeError, OSError) as error:
            found = {name: {"error": str(error)[:200]}}
        for row, result in found.items():
            keep(row, result)
        rows |= found
    return rows


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; what is wrong with it is one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="run.py [flags]"
    )
    parser.error = lambda message: sys.exit(f"run.py: {message}; see --help")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed ratios; write nothing"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], help="rows whose name has one of these"
    )
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--seconds", type=float, help="measure each row for so long: steadier medians")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "speed-models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "speed.json")
    return parser.parse_args(argv)


def choose(work: dict[str, Work], only: list[str]) -> dict[str, Work]:
    """Return the work whose name has one of the words; one line where a word names nothing."""
    for word in only:
        if not any(word in name for name in work):
            sys.exit(f"run.py: --only {word}: names none of {'; '.join(work)}")
    return {name: w for name, w in work.items() if not only or any(word in name for word in only)}


def main(argv: list[str] | None = None) -> int:
    """Measure, and write or compare; return the exit code."""
    flags = read_flags(argv)
    if flags.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("run.py: --device cuda: torch finds no GPU here")
    work = choose(list_work(flags.device, flags.quick, flags.folder, flags.seconds), flags.only)
    if flags.list:
        print("\n".join(work))
        return 0
    group = flags.device + (", quick" if flags.quick else "")
    results = Results(str(flags.results))
    committed = results.rows.get(group, {})
    if flags.check and not committed:
        sys.exit(f"run.py: --check: {flags.results} has no rows of {group}; run it without --check first")
    flags.folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)])
    if flags.check:
        rows = run_work(work, lambda name, row: print(name, row.get("ratios", row), flush=True))
        falls = find_falls(committed, rows)
        print("\n".join(falls) or f"no ratio of {len(rows)} rows fell by more than 20 %")
        return 1 if falls else 0
    results.add(group, "machine", describe_machine(flags.device, command))
    rows = run_work(work, partial(results.add, group))
    if flags.results == ROOT / "benchmarks" / "speed.json":
        page = flags.results.with_name("RESULTS.md")
        page.write_text(put_section(page.read_text("utf-8"), render(results.rows)), "utf-8")
    return 1 if any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

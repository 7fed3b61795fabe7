"""What the speed benchmark writes and says: the machine, the section of RESULTS.md, what fell since then."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "pillow")
TOLD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
TOLERANCE = 0.2
HEADING = "## Speed"
ABOUT = """\
`python benchmarks/run.py`: random weights in true shapes, photos as JPEG files, each side a process of
its own. The sides take turns, and the ratio is the median over rounds of the other side's time in units
of ours: above 1, ours is faster. Same model, LoRA, batches and random numbers in training; 20 forced
tokens, greedy, in captioning. CPU s, waiting for data and seconds are of a step, or of all images; GB is
the highest resident (GPU: allocated) memory. The share is of the FLOPs that a large matrix product
reaches between the rounds, counted for ours. The load is that before the row.
"""


def describe_machine(device: str, command: str) -> dict[str, Any]:
    """Return what the numbers depend on: processor, versions, load, commit."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {
        "cpu": (re.search(r"^model name\s*: (.*)", info, re.M) or [0, platform.processor()])[1],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": find_cpu_flags(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "command": command,
        "commit": _find_commit(),
    }
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def find_cpu_flags() -> list[str]:
    """Return what the processor has of the instructions that decide how fast products are; Linux only."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = set((re.search(r"^flags\s*: (.*)", info, re.M) or [0, ""])[1].split())
    return [flag for flag in TOLD_FLAGS if flag in found]


def _find_commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def find_falls(committed: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    """Return a line for each ratio that is more than 20 % below the committed one, or cannot be had any more.

    Args:
        committed: row → result, as committed.
        rows: row → result, as measured now; rows that are in one of the two only are not compared.
    """
    lines = []
    for name, row in rows.items():
        for side, before in committed.get(name, {}).get("ratios", {}).items():
            now = row.get("ratios", {}).get(side)
            if now is None:
                why = row.get("error") or row.get("sides", {}).get(side, {}).get("error", "not measured")
                lines.append(f"{name}: against {side} {before:.2f} × before, now none: {why}")
            elif now < before * (1 - TOLERANCE):
                lines.append(
                    f"{name}: against {side} {now:.2f} ×, {before:.2f} × before ({now / before - 1:+.0%})"
                )
    return lines


def render(results: dict[str, Any]) -> str:
    """Return the section of RESULTS.md: all groups (device, quick or not) that were measured."""
    lines = [
        HEADING,
        "",
        *ABOUT.splitlines(),
    ]
    for group, rows in results.items():
        lines += ["", f"### {group}", "", _say_machine(rows["machine"]), ""]
        compared = {name: row for name, row in rows.items() if "sides" in row}
        lines += _render_sides(compared)
        lines += _render_startup({n: r for n, r in rows.items() if "bare_seconds" in r or n == "--help"})
        lines += [f"- {name}: not measured: {row['error']}" for name, row in rows.items() if "error" in row]
    return "\n".join(lines).rstrip() + "\n"


def _say_machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['gpu']}; " if "gpu" in machine else ""
    load = ", ".join(str(load) for load in machine["load_before"])
    return (
        f"{where}{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}), threads: "
        f"{machine['threads']}; Python {machine['python']}, {versions}; load before {load}; commit "
        f"{machine['commit']}; `{machine['command']}`"
    )


def _render_sides(rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| row | side | ratio | CPU ratio | images/s | s | CPU s | waiting for data s | GB | same result |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        label = f"{name} ({row['rounds']} rounds, load {row['load']}, {row['share_of_peak']:.0%} of peak)"
        for side, found in row["sides"].items():
            if "error" in found:
                lines.append(f"| {label} | {side} | | | | | | | | does not run: {found['error']} |")
                continue
            ratio, cpu = (row[key].get(side) for key in ("ratios", "cpu_ratios"))
            numbers = [f"{value:.2f}" if value else "" for value in (ratio, cpu)]
            numbers += [f"{found['images_per_second']:.2f}"]
            numbers += [f"{found[key]:.2f}" for key in ("seconds", "cpu_seconds", "data_seconds")]
            numbers += [f"{found['peak_bytes'] / 1e9:.2f}"]
            lines.append(f"| {label} | {side} | {' | '.join(numbers)} | {_say_same(found)} |")
            label = ""
    for name, row in rows.items():
        if "kernels" in row:
            told = "; ".join(f"`{kernel}` {milliseconds} ms" for kernel, milliseconds in row["kernels"])
            lines += ["", f"{name}, the longest kernels: {told}"]
    return [*lines, ""]


def _say_same(found: dict[str, Any]) -> str:
    if "largest_loss_difference" in found:
        difference = found["largest_loss_difference"]
        return "losses equal" if not difference else f"losses differ by up to {difference:g}"
    if "images_with_other_tokens" in found:
        differing = found["images_with_other_tokens"]
        return "tokens equal" if not differing else f"tokens of {differing} images differ"
    return ""


def _render_startup(rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| until | ours s | bare script s | ratio | images/s | CPU s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ratio = row.get("ratios", {}).get("bare script", "")
        cells = [row["seconds"], row.get("bare_seconds", ""), ratio]
        cells += [row.get("images_per_second", ""), row.get("cpu_seconds", "")]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def put_section(text: str, section: str) -> str:
    """Return the text of RESULTS.md with its section of this heading replaced, or added at the end."""
    pattern = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.M | re.S)
    if pattern.search(text):
        return pattern.sub(lambda _: section + "\n", text).rstrip() + "\n"
    return text.rstrip() + "\n\n" + section

"""Measure how long a run takes to its first step on a dataset of very many images, and its memory until then.

    python benchmarks/start.py --images 20000 --form files
    python benchmarks/start.py --images 1000000 --form tars

Each run is started twice: with no index, and with the one that the first has left. The images are PNG files
of 8 × 8 pixels, each with other ones, a thousand in a folder with one caption (hard links) or 10,000 in a
shard; the base is a tiny BLIP. Memory is the sum of what all processes of the
run hold, what they share counted once (PSS). The dataset is made in --folder and deleted.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.bases import make_base  # noqa: E402
from benchmarks.speed.sides import OFFLINE  # noqa: E402
from caption_train.shards.formats import make_member  # noqa: E402

FORMS = ("files", "rows", "tars", "parquet")
IN_FOLDER = 1000
IN_SHARD = 10_000
PROBE_SECONDS = 1.0
SETTLED_SECONDS = 3
"""Images that changed less than two seconds ago are not kept in the index."""


def make_png(number: int) -> bytes:
    """Return a PNG of 8 × 8 pixels that depend on a number."""
    pixels = number.to_bytes(4, "big") * 48
    rows = b"".join(b"\0" + pixels[row * 24 : row * 24 + 24] for row in range(8))
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND")
    made = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def make_caption(number: int) -> str:
    """Return a caption of about 60 characters."""
    return f"a small square of colours, number {number}, on a plain background"


def make_files(root: Path, images: int, form: str) -> None:
    """Make folders of images, with a caption file beside each or with one metadata.jsonl."""
    rows = []
    for number in range(images):
        folder = f"{number // IN_FOLDER:05d}"
        if number % IN_FOLDER == 0:
            (root / folder).mkdir(parents=True)
        name = f"{root}/{folder}/{number:09d}"
        with open(f"{name}.png", "wb") as file:  # noqa: PTH123
            file.write(make_png(number))
        if form == "files" and number % IN_FOLDER == 0:
            caption = f"{name}.txt"
            Path(caption).write_text(make_caption(number))
        elif form == "files":
            os.link(caption, f"{name}.txt")
        else:
            rows.append({"file_name": f"{folder}/{number:09d}.png", "text": make_caption(number)})
    if form == "rows":
        with (root / "metadata.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def make_shards(root: Path, images: int, form: str) -> None:
    """Make tars or Parquet files of 10,000 images."""
    root.mkdir(parents=True)
    for start in range(0, images, IN_SHARD):
        numbers = range(start, min(start + IN_SHARD, images))
        path = root / f"{start // IN_SHARD:05d}.{'tar' if form == 'tars' else 'parquet'}"
        if form == "tars":
            with path.open("wb") as tar:
                for number in numbers:
                    tar.write(make_member(f"{number:09d}.png", make_png(number)))
                    tar.write(make_member(f"{number:09d}.txt", make_caption(number).encode()))
                tar.write(bytes(1024))
        else:
            import pyarrow
            from pyarrow import parquet

            rows = [
                {"image": {"bytes": make_png(n), "path": f"{n:09d}.png"}, "text": make_caption(n)}
                for n in numbers
            ]
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)


def measure(command: list[str], code: Path, log: Path, cache: Path) -> dict[str, float]:
    """Start a run of a checkout, end it after its first step; return seconds and the peak of its memory."""
    environment = os.environ | OFFLINE | {"XDG_CACHE_HOME": str(cache)}
    began = time.perf_counter()
    with (log.parent / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=code, env=environment, stdout=output, stderr=output)
        peak, most = 0.0, {}
        try:
            while not log.exists() or not log.stat().st_size:
                if process.poll() is not None:
                    raise RuntimeError((log.parent / "output.txt").read_text()[-2000:])
                held = read_memory(process.pid)
                if sum(held) > peak:
                    peak, most = sum(held), held
                time.sleep(PROBE_SECONDS)
            seconds = time.perf_counter() - began
            spent = read_cpu(process.pid)
        finally:
            for one in reversed(_list_processes(process.pid)):
                one.kill()
            process.wait()
    return {
        "s": round(seconds, 1),
        "CPU s": round(spent, 1),
        "peak MB": round(peak / 1e6),
        "of it main MB": round(most[0] / 1e6) if most else 0,
    }


def _list_processes(number: int) -> list[psutil.Process]:
    """Return a process and its descendants; none if it has ended."""
    with suppress(psutil.Error):
        main = psutil.Process(number)
        return [main, *main.children(recursive=True)]
    return []


def read_memory(number: int) -> list[int]:
    """Return the bytes that a process and its descendants hold, what several share divided among them."""
    held = []
    with suppress(OSError, IndexError):
        for process in _list_processes(number):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            held.append(int(text.partition("\nPss:")[2].split()[0]) * 1024)
    return held


def read_cpu(number: int) -> float:
    """Return the CPU seconds of a process and of its descendants, and of those that they have waited for."""
    spent = 0.0
    with suppress(psutil.Error):
        for process in _list_processes(number):
            times = process.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


def main() -> None:
    """Make the dataset, start a run on it twice, delete it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--form", choices=FORMS, default="files")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/start"))
    parser.add_argument(
        "--keep", action="store_true", help="use the dataset of an earlier call, and leave it"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often each start is measured")
    parser.add_argument("--processes", type=int, default=1, help="training processes, started by torchrun")
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("flags", nargs="*", help="further flags of training, after --")
    args = parser.parse_args()
    data = args.folder / f"{args.form}-{args.images}"
    try:
        if not data.exists():
            make = make_files if args.form in ("files", "rows") else make_shards
            make(data, args.images, args.form)
        base = make_base("blip-tiny", args.folder)
        time.sleep(SETTLED_SECONDS)
        for _ in range(args.rounds):
            cache = args.folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for index in ("none", "kept"):
                out = args.folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                launch = ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}", "--standalone"]
                command = [sys.executable, *(launch if args.processes > 1 else ())]
                command += [str(args.code / "train_blip_network.py"), str(data), str(out)]
                command += ["--model_id", str(base), "--device", "cpu", *args.flags]
                found = measure(command, args.code, out / "log.jsonl", cache)
                told = {"images": args.images, "form": args.form, "index": index}
                told |= {"processes": args.processes} if args.processes > 1 else {}
                print(json.dumps(told | found), flush=True)
    finally:
        if not args.keep:
            # Not the folder: it may hold what is not ours.
            for made in (data, args.folder / "cache", args.folder / "out"):
                shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    main()

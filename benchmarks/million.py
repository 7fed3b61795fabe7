"""Caption a folder of very many images with a model that costs nothing: memory over the whole run, and time.

    python benchmarks/million.py --images 1000000
    python benchmarks/million.py --images 5000000 --folders 5000 --output --save_captions

The images are hard links to one PNG of a pixel, nobody opens them, and what captions them needs no torch:
what is measured is all that captioning does besides. `--again` measures a run that is killed half-way, and
the one that goes on. What is made in --folder is deleted. CODE is another checkout to measure.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
LINKS = 30_000
"""Hard links to one file; ext4 has at most 65,000."""
PROBE_SECONDS = 0.02


def make_tree(root: Path, images: int, folders: int) -> None:
    """Make a tree of images."""
    for number in range(images):
        folder = root / f"{number * folders // images:05d}" if folders > 1 else root
        if number * folders % images < folders:
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:09d}.png"
        if number % LINKS == 0:
            source = path
            path.write_bytes(PIXEL)
        else:
            os.link(source, path)


def caption(arguments: list[str]) -> None:
    """Be the process that is measured; print one line of JSON."""
    started = float(os.environ["STARTED"])
    sys.path.insert(0, os.environ.get("CODE", str(ROOT)))
    from caption_train.captioning import job
    from caption_train.captioning.engines.engine import Engine
    from caption_train.captioning.plan import CaptionResult
    from caption_train.config.captioning import CaptionOptions
    from caption_train.families.base import Family, Generated, ModelFacts

    class StandIn(Family):
        name, title, model_id = "stand-in", "Stand-in", "stand-in/base"
        base_models = ("stand-in/base",)
        facts = ModelFacts((), {}, default_prompt="say")
        load = encode = make_collator = generate = None

    first = []

    class Repeats(Engine):
        def describe(self):
            return "nothing"

        def stream(self, tasks):
            for task in tasks:
                first.append(time.time() - started) if not first else None
                text = f"a caption of {task.image.name}, as long as captions of pictures often are"
                yield CaptionResult(task.image, (1, 1), Generated(text, [1, 2, 3], True))

    StandIn.__abstractmethods__ = frozenset()
    job.make_engine = Repeats
    images, output, save, *more = arguments
    options = CaptionOptions(
        images=[images],
        recursive=True,
        output=Path(output) if output else None,
        save_captions=bool(save),
        **json.loads(more[0] if more else "{}"),
    )
    if "PROFILE" in os.environ:
        import cProfile

        profile = cProfile.Profile()
        profile.enable()
    if "UNSYNCED" in os.environ:
        os.fsync = lambda descriptor: None
    code = job.caption_folder(options, StandIn())
    if "PROFILE" in os.environ:
        profile.disable()
        profile.dump_stats(os.environ["PROFILE"])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result = {"exit code": code, "first caption s": first and round(first[0], 1)}
    result["CPU s"] = round(time.process_time(), 1)
    print(json.dumps(result | {"peak MB": round(int(status["VmHWM"].split()[0]) / 1000)}))


def measure(arguments: list[str], kill_after: int = 0) -> dict:
    """Run `caption` in a process and sample its memory; kill it when its journal has so many bytes."""
    began = time.time()
    command = [sys.executable, __file__, "--measure", *arguments]
    environment = os.environ | {"STARTED": str(began)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output = Path(arguments[1] or "none")
    journal = output.with_name(f".{output.name}.0.part")
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.partition("VmRSS:")[2].split()[0]))
            if kill_after and journal.exists() and journal.stat().st_size > kill_after:
                process.send_signal(signal.SIGKILL)
        except (OSError, IndexError):
            pass
        time.sleep(PROBE_SECONDS)
    lines = process.stdout.read().strip().splitlines()
    result = json.loads(lines[-1]) if lines else {"killed": True}
    return result | {"sampled peak MB": round(peak / 1000), "s": round(time.time() - began, 1)}


def main() -> None:
    """Make the tree, measure, delete it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/million"))
    parser.add_argument("--output", action="store_true", help="write captions.jsonl")
    parser.add_argument("--save_captions", action="store_true", help="write caption files")
    parser.add_argument("--again", action="store_true", help="kill a run half-way, and go on")
    parser.add_argument("--keep", action="store_true", help="use the tree of an earlier run, and leave it")
    parser.add_argument("--unsynced", action="store_true", help="do not wait for the disk after each file")
    parser.add_argument("--options", default="{}", help="further options of captioning, in JSON")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        caption(args.measure)
        return
    if args.unsynced:
        os.environ["UNSYNCED"] = "1"
    try:
        if not (args.folder / "images").exists():
            make_tree(args.folder / "images", args.images, args.folders)
        output = str(args.folder / "captions.jsonl") if args.output or args.again else ""
        arguments = [str(args.folder / "images"), output, "save" if args.save_captions else "", args.options]
        if args.again:
            print(json.dumps(measure(arguments, kill_after=60 * args.images)), flush=True)
        print(json.dumps(measure(arguments)), flush=True)
    finally:
        if not args.keep:
            # Not the folder: it may hold what is not ours.
            shutil.rmtree(args.folder / "images", ignore_errors=True)
            for left in [*args.folder.glob("captions.jsonl*"), *args.folder.glob(".captions.jsonl*")]:
                left.unlink()


if __name__ == "__main__":
    main()

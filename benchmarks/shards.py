"""Measures reading, copying and indexing tars of many images: time and memory must grow as their number does.

    python benchmarks/shards.py                  10,000 and 100,000 images in one tar
    python benchmarks/shards.py 1000000          as many as that

Each number is of a process of its own, without torch and models: a tar is read and written with new captions,
and read as a dataset twice.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from caption_train.shards.dataset import inspect_shards
from caption_train.shards.records import NewCaption
from caption_train.shards.tar import TarReader

COUNTS = (10_000, 100_000)


def write_tar(path: Path, count: int) -> None:
    """Write a tar of tiny images with a caption and a JSON each."""
    from PIL import Image

    image = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(image, "PNG")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(count):
            parts = (("png", image.getvalue()), ("txt", b"a caption"), ("json", b'{"width": 8}'))
            for suffix, content in parts:
                info = tarfile.TarInfo(f"{index:09}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            tar.members = []


def copy(path: Path) -> None:
    """Read a tar and write it with a new caption for every image."""
    reader = TarReader(path)
    count = sum(1 for _ in reader.records())

    def captions() -> Iterator[NewCaption]:
        for index in range(count):
            yield NewCaption(index, f"caption {index}")

    with Path(f"{path}.copy").open("wb") as file:
        reader.write(file, captions(), ".txt")


def index(path: Path) -> None:
    """Read a tar as a dataset, as a training run does before it looks at images."""
    inspect_shards(path)


def measure(name: str, path: Path) -> dict[str, float]:
    """Return seconds and megabytes of a process that does one of the two."""
    script = "from benchmarks.shards import work; import sys; work(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(path)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, path: str) -> None:
    """Do one of the two, and print seconds and the most megabytes that were in use."""
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    {"copy": copy, "index": index}[name](Path(path))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.monotonic() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": time.process_time(),
                "megabytes": peak / 1024,
                "more": (peak - before) / 1024,
            }
        )
    )


def main(counts: list[int]) -> None:
    """Measure tars of these sizes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        for count in counts:
            path = Path(folder) / f"{count}.tar"
            write_tar(path, count)
            time.sleep(3)  # A file that has just changed is not kept.
            for name in ("copy", "index", "index"):
                # The second time, what was found is kept.
                found = measure(name, path)
                print(
                    f"{name} {count:>9,} images ({path.stat().st_size / 1e6:,.0f} MB): "
                    f"{found['seconds']:.1f} s, {found['cpu'] / count * 1e6:.0f} µs of CPU time an image, "
                    f"peak {found['megabytes']:,.0f} MB, {found['more']:,.0f} of them for the tar"
                )
            path.unlink()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(COUNTS))

"""Damaged files of every kind: reading them works, or ends in one line within seconds.

FUZZ_CASES=5000 tries more cases than CI does, FUZZ_SEED other ones.
"""

import gc
import itertools
import os
import random
import shutil
from functools import cache
from pathlib import Path

import pytest

from caption_train.errors import CaptionTrainError
from caption_train.reviewing.history import HISTORY_NAME
from tests.fixtures.fuzz import SECONDS, Hung, damage, ending_after
from tests.fixtures.fuzz_kinds import CAPTION_FILES, OTHERS, caption
from tests.fixtures.runs import make_options, train, write_pairs

CASES = int(os.environ.get("FUZZ_CASES", 240))
SEED = int(os.environ.get("FUZZ_SEED", 0))
SHARES = {
    **{"base blip": 0.15, "base florence": 0.1, "base moondream": 0.1, "base vlm": 0.1},
    **{"adapter blip": 0.1, "adapter florence": 0.05, "checkpoint": 0.1},
    **{"dataset": 0.1, "kohya": 0.05, "config": 0.1, "list": 0.05, "captions": 0.15},
    **{"review": 0.15, "shards": 0.05},
}
"""How many of the cases go to each kind of file."""


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    return sorted(write_pairs(tmp_path_factory.mktemp("picture"), 1).glob("*.png"))[0]


@pytest.fixture(scope="session")
def sound(tiny_base, base, train_tiny, tmp_path_factory, picture):
    """`sound(kind)`: an undamaged folder of a kind, and what reads it."""

    def read_base(family):
        return tiny_base(family), lambda folder: caption(family, picture, base_model=str(folder))

    def read_lora(family):
        model = str(tiny_base(family))
        return train_tiny(family), lambda folder: caption(
            family, picture, peft_model=folder, base_model=model
        )

    def make(kind):
        group, _, family = kind.partition(" ")
        if group == "base":
            return read_base(family)
        if group == "adapter":
            return read_lora(family)
        return OTHERS[kind](tmp_path_factory.mktemp(kind), base)

    return cache(make)


@pytest.fixture(scope="session")
def train_tiny(tiny_base, tmp_path_factory):
    def run(family):
        pairs, out = write_pairs(tmp_path_factory.mktemp("few"), 2), tmp_path_factory.mktemp("lora")
        train(family, make_options(family, tiny_base(family), pairs, out, epochs=1))
        shutil.rmtree(next(out.glob("epoch-*")))
        (out / "last").unlink()
        return out

    return run


MAY_LIST = ("dataset", "kohya", "config", "captions")
"""Kinds whose errors list one problem a line."""


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


def try_case(kind: str, number: int, sound, tmp_path: Path) -> str | None:
    """Damage a copy and read it; return what went wrong."""
    rng = random.Random(f"{SEED} {kind} {number}")
    folder, read = sound(kind)
    copy = shutil.copytree(folder, tmp_path / f"{kind} {number}", symlinks=True)
    files = list_files(copy)
    names = {
        "config": ["a.yaml"],
        "list": ["images.list"],
        "kohya": ["meta.json"],
        "dataset": ["metadata.jsonl"],
        "captions": CAPTION_FILES,
        "review": [HISTORY_NAME],
        "shards": [".a.tar.part", ".b.parquet.part", "a.tar"],
    }
    chosen = [path for path in files if path.name in names.get(kind, ())] if rng.random() < 0.7 else []
    done = damage(rng.choice(chosen or files), rng)
    where = f"{kind}, case {number}, {done}"
    try:
        with ending_after(SECONDS):
            read(copy)
    except CaptionTrainError as error:
        lines = str(error).splitlines()
        if not lines or (len(lines) > 1 and kind not in MAY_LIST) or len(max(lines, key=len)) > 2_000:
            return f"{where}: {len(lines)} lines: {str(error)[:300]}"
    except Hung:
        return f"{where}: did not end"
    except Exception as error:
        tail = error.__traceback__
        while tail.tb_next:
            tail = tail.tb_next
        at = f"{Path(tail.tb_frame.f_code.co_filename).name}:{tail.tb_lineno}"
        return f"{where}: {type(error).__name__} at {at}: {str(error)[:200]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"{where}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        gc.collect() if number % 10 == 0 else None
    return None


@pytest.mark.parametrize("kind", SHARES)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, sound, tmp_path):
    count = max(round(CASES * SHARES[kind]), 1)
    failures = (try_case(kind, number, sound, tmp_path) for number in range(count))
    found = list(itertools.islice(filter(None, failures), 40))
    assert not found, "\n".join(found)

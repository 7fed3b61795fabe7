"""Damaged files of every kind: reading them works, or ends in one line within seconds.

FUZZ_CASES=5000 tries more cases than CI does, FUZZ_SEED other ones.
"""

import gc
import itertools
import json
import os
import random
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

from caption_train.adapters.record import read_adapter, read_request, resolve_base
from caption_train.captioning.generate import caption_images, load_captioner, make_generation
from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.job import caption_folder
from caption_train.cli.arguments import parse_options
from caption_train.compiling.compile import compile_captions
from caption_train.config.captioning import CaptionOptions
from caption_train.config.compiling import CompileOptions
from caption_train.config.training import TrainOptions
from caption_train.data.image_index import inspect_images
from caption_train.data.images import ImageError
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.reviewing.history import HISTORY_NAME, History
from caption_train.reviewing.items import Library
from caption_train.reviewing.queries import Replacement
from caption_train.reviewing.review import Review, describe_batch
from caption_train.reviewing.stores import open_store
from caption_train.shards.dataset import inspect_shards
from caption_train.system.files import hash_file
from caption_train.training.run.data import read_training_data
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.fuzz import SECONDS, Hung, damage, ending_after
from tests.fixtures.runs import make_options, train, write_pairs
from tests.fixtures.shards import make_image, write_parquet, write_shard

CASES = int(os.environ.get("FUZZ_CASES", 240))
SEED = int(os.environ.get("FUZZ_SEED", 0))
SHARES = {
    **{"base blip": 0.15, "base florence": 0.1, "base moondream": 0.1, "base vlm": 0.1},
    **{"adapter blip": 0.1, "adapter florence": 0.05, "checkpoint": 0.1},
    **{"dataset": 0.1, "kohya": 0.05, "config": 0.1, "list": 0.05, "captions": 0.15},
    **{"review": 0.15, "shards": 0.05},
}
"""How many of the cases go to each kind of file."""
CAPTION_FILES = ("llava.json", "coco.json", "messages.jsonl", "table.csv", "table.parquet")


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


def caption(name, picture, **options):
    family = get_family(name)
    options = CaptionOptions(images=[str(picture)], max_token_length=3, num_workers=0, **options)
    adapter = read_adapter(options.peft_model) if options.peft_model else None
    prompt, settings = read_request(options, family)
    base = resolve_base(family, options.base_model, None, prompt, adapter, settings=settings)
    model, processor = load_captioner(family, base, options, torch.device("cpu"))
    list(caption_images(family, model, processor, [picture], make_generation(options, base.prompt)))


def make_checkpoint(folder: Path, base: Path):
    pairs = write_pairs(folder / "pairs", 4)
    out = folder / "run"
    train("blip", make_options("blip", base, pairs, out, epochs=1, save_every_n_steps=1))
    for path in (out / "last", out / "log.jsonl", *out.glob("epoch-*")):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def resume(copy: Path) -> None:
        checkpoint = next(copy.glob("step-*"))
        manifest = checkpoint / "manifest.json"
        if manifest.is_file():
            refresh(manifest)
        options = make_options(
            "blip", base, pairs, copy, epochs=1, resume=str(checkpoint), resume_anyway=True
        )
        train("blip", options)

    return out, resume


def refresh(manifest: Path) -> None:
    """Let a manifest agree with the damaged files, as whoever made them on purpose would."""
    try:
        sums = json.loads(manifest.read_text())
        for name in sums:
            if (manifest.parent / name).is_file():
                sums[name] = hash_file(manifest.parent / name)
        manifest.write_text(json.dumps(sums))
    except (ValueError, RecursionError, AttributeError, TypeError, OSError):
        return


def make_dataset(folder: Path, base: Path):
    pairs = write_pairs(folder / "pairs", 3)
    rows = [{"file_name": f"{i:02d}.png", "text": "a cat", "split": "train", "prompt": "a"} for i in range(3)]
    (pairs / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(pairs, folder / "pairs" / "more")
    (pairs / "more" / "metadata.jsonl").unlink()

    def read(copy: Path) -> None:
        from caption_train.training.distributed.accelerator import make_accelerator

        options = make_options("blip", base, copy, folder / "out", on_bad_data="skip", validation_split=0.3)
        read_training_data(options, make_accelerator(options))

    return pairs, read


def make_kohya(folder: Path, base: Path):
    pairs = write_pairs(folder / "pairs", 3)
    entries = {f"{i:02d}": {"caption": "a cat", "tags": "cat, mat"} for i in range(3)}
    (pairs / "meta.json").write_text(json.dumps(entries))

    def read(copy: Path) -> None:
        compile_captions(
            CompileOptions(dataset_dir=copy, output_dir=folder / "compiled", validation_split=0.3)
        )

    return pairs, read


def make_captions(folder: Path, base: Path):
    from pyarrow import parquet, table

    pairs = write_pairs(folder / "pairs", 3)
    names = [f"{i:02d}.png" for i in range(3)]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    llava = [{"image": name, "conversations": turns} for name in names]
    coco = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": "a cat"} for i in range(3)],
    }
    question = {"role": "user", "content": [{"type": "image", "image": "00.png"}]}
    messages = {"messages": [question, {"role": "assistant", "content": "a cat"}]}
    (pairs / "llava.json").write_text(json.dumps(llava))
    (pairs / "coco.json").write_text(json.dumps(coco))
    (pairs / "messages.jsonl").write_text(2 * (json.dumps(messages) + "\n"))
    (pairs / "table.csv").write_text("file_name,text,prompt\n" + "".join(f"{n},a cat,Q\n" for n in names))
    parquet.write_table(table({"file_name": names, "text": ["a cat"] * 3}), pairs / "table.parquet")

    def read(copy: Path) -> None:
        errors = []
        for name in CAPTION_FILES:
            try:
                compile_captions(CompileOptions(dataset_dir=copy, captions=[copy / name], dry_run=True))
            except CaptionTrainError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return pairs, read


def make_config(folder: Path, base: Path):
    (folder / "made").mkdir()
    lines = ["dataset_dir: images", "output_dir: out", "epochs: 3", "learning_rate: 1e-4", "name: a"]
    lines += [
        "target_modules: [qkv, proj]",
        "shuffle_captions: true",
        "quantize: 4bit",
        "mixed_precision: no",
    ]
    (folder / "made" / "a.yaml").write_text("\n".join(lines) + "\n")

    def read(copy: Path) -> None:
        parse_options(TrainOptions, ["--config", str(copy / "a.yaml")], prog="train")

    return folder / "made", read


def make_list(folder: Path, base: Path):
    pairs = write_pairs(folder / "pairs", 3)
    (pairs / "images.list").write_text("00.png\n01.png\n" + str(pairs / "02.png") + "\n")
    return pairs, lambda copy: find_inputs([str(copy / "images.list")])


def make_review(folder: Path, base: Path):
    pairs = write_pairs(folder / "pairs", 3)
    review = open_review(pairs)
    ids = list(review.library)
    review.save([(ids[0], review.captions[ids[0]], "one")], "edit", accept=True)
    review.mark(ids, flagged=True)
    review.undo()
    review.replace(review.preview(ids, Replacement("e", "a"))[0])
    review.mark(ids, accepted=True)

    def read(copy: Path) -> None:
        review = open_review(copy)
        review.progress(), review.describe(review.library)
        list(map(describe_batch, review.history.batches.values()))
        for _ in range(10):
            if review.history.last() is None:
                return
            review.undo()

    return pairs, read


def open_review(folder: Path) -> Review:
    library = Library(folder)
    return Review(library, open_store(library, "auto", ".txt"), History(library.root))


def make_shards(folder: Path, base: Path):
    """A tar and a Parquet file, and an output where both are half captioned."""
    made = folder / "made"
    (made / "in").mkdir(parents=True)
    write_shard(made / "in/a.tar", captions={3: "by hand"})
    rows = [{"image": {"bytes": make_image(level), "path": "x.png"}, "text": None} for level in range(7)]
    write_parquet(made / "in/b.parquet", rows)

    def run(copy: Path, **settings) -> None:
        for name in ("in/a.tar", "in/b.parquet"):
            options = {"images": [str(copy / name)], "output_shards": str(copy / "out"), **settings}
            caption_folder(CaptionOptions(num_workers=0, **options), FakeFamily())

    def read(copy: Path) -> None:
        run(copy)
        for name in ("in/a.tar", "in/b.parquet"):
            with suppress(UsageError):
                for image in inspect_images([pair.image for pair in inspect_shards(copy / name)[0]]):
                    assert isinstance(image, tuple | ImageError)

    run(made, limit=3)
    return made, read


OTHERS = {
    **{"checkpoint": make_checkpoint, "dataset": make_dataset, "kohya": make_kohya},
    **{"config": make_config, "list": make_list, "captions": make_captions},
    **{"review": make_review, "shards": make_shards},
}
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

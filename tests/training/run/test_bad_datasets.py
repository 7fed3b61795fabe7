"""Mutated datasets, from files on the disk to batches for the model: each is trained on or refused."""

import functools
import io
import json
import os
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families import get_family
from caption_train.training.model import check_prompts
from caption_train.training.run.batch_plan import BatchPlan
from caption_train.training.run.batches import CaptionDataset, make_train_dataloader
from caption_train.training.run.data import read_training_data


def encode(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def declare_png(width: int, height: int) -> bytes:
    """Return a PNG that says it is so large and holds next to nothing."""
    chunks = (b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    packed = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (*chunks, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


SMALL = Image.new("RGB", (9, 7), "red")
IMAGES = [
    encode(SMALL, "JPEG"),
    encode(SMALL.convert("CMYK"), "JPEG"),
    encode(SMALL, "GIF", save_all=True, append_images=[Image.new("RGB", (9, 7), "blue")] * 2),
    encode(Image.fromarray(np.full((5, 5), 40_000, np.uint16)), "PNG"),
    encode(Image.fromarray(np.full((5, 5), 70_000, np.int32)), "TIFF"),
    encode(Image.fromarray(np.full((5, 5), np.nan, np.float32)), "TIFF"),
    encode(SMALL.convert("LA"), "PNG"),
    encode(Image.new("1", (1, 1)), "BMP"),
    encode(Image.new("L", (3000, 1)), "PNG"),
    declare_png(60_000, 60_000),
    declare_png(2**31 - 1, 1),
    declare_png(0, 0),
    declare_png(9, 7),
]
TEXTS = [
    *(
        "a cat",
        "",
        " \n",
        "a\0b",
        "\ufeffa cat\r\non a mat",
        "cat, " * 900,
        "\u202eright to left",
        "🐈‍⬛ 一只猫",
    ),
    *(
        "<loc_1><CAPTION></s><pad>",
        "[DEC] [SEP]",
        "a" * 5000,
        "\x1b[31m",
        "\u2028",
        ",,,",
        "%s {0} \\",
        "NaN",
    ),
]
NAMES = [
    *(
        "0.png",
        "1.png",
        "gone.png",
        "../0.png",
        "/etc/passwd",
        "sub/../0.png",
        "link.png",
        "out.png",
        "folder",
    ),
    *(
        "a\0.png",
        "x" * 300,
        "\ud800.png",
        "0.PNG",
        ".",
        "",
        None,
        7,
        ["0.png"],
        "..\\0.png",
        "C:\\0.png",
        "pipe.png",
    ),
]
VALUES = st.sampled_from([*TEXTS, None, 5, [], {}, True])
ROWS = st.fixed_dictionaries(
    {"file_name": st.sampled_from(NAMES), "text": VALUES},
    optional={
        "split": st.sampled_from(["train", "validation", "test", "", 3, None]),
        "prompt": VALUES,
        "caption": VALUES,
    },
).map(lambda row: json.dumps(row).encode())
LINES = (
    ROWS | st.binary(max_size=40) | st.sampled_from([b"", b"{", b"[]", b"[" * 2000, b"null", b"NaN", b"\xff"])
)
CHANGES = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 200)),
    st.tuples(st.just("flip"), st.integers(0, 10_000)),
    st.tuples(st.just("bytes"), st.binary(max_size=60) | st.sampled_from(IMAGES)),
    st.tuples(st.just("bytes"), st.sampled_from(TEXTS).map(str.encode)),
    st.tuples(st.just("bytes"), st.sampled_from([TEXTS[0].encode("utf-16"), b"caf\xe9"])),
    st.tuples(st.just("huge"), st.none()),
    st.tuples(st.just("gone"), st.none()),
    st.tuples(st.just("folder"), st.none()),
    st.tuples(st.just("pipe"), st.none()),
    st.tuples(
        st.just("link"), st.sampled_from(["/etc/passwd", "nowhere", "0.png", ".", "../outside/secret.png"])
    ),
)


def change(path: Path, kind: str, value) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "cut":
        path.write_bytes(data[:value])
    elif kind == "flip":
        place = value % len(data)
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    elif kind == "bytes":
        path.write_bytes(value)
    elif kind == "huge":
        with path.open("wb") as file:
            # Ten megabytes of nothing that take no time to write.
            file.truncate(10_000_000)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(value)


PICTURES = [encode(Image.new("RGB", (8, 8), (index * 40, 0, 0)), "PNG") for index in range(3)]


def make_dataset(folder: Path) -> None:
    """Write three pairs, and beside them what rows may name."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "folder").mkdir(parents=True)
    for index, picture in enumerate(PICTURES):
        (folder / f"{index}.png").write_bytes(picture)
        (folder / f"{index}.txt").write_text(f"picture {index}")
    (folder.parent / "outside").mkdir(exist_ok=True)
    shutil.copy(folder / "0.png", folder.parent / "outside" / "secret.png")
    (folder / "link.png").symlink_to("1.png")
    (folder / "out.png").symlink_to("../outside/secret.png")
    os.mkfifo(folder / "pipe.png")


@pytest.fixture(scope="module")
def batches_of(tiny_base):
    """Return a function from a dataset's pairs to its batches, as the loop reads them."""
    family = get_family("florence")
    _, processor = family.load(str(tiny_base("florence")))
    make_collator = functools.partial(family.make_collator, processor, prompt="<CAPTION>", max_length=16)

    def batches_of(pairs):
        plan = BatchPlan(len(pairs), batch_size=2)
        dataset = CaptionDataset(pairs, shuffle_captions=True)
        return list(make_train_dataloader(dataset, plan, make_collator()))

    return batches_of


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


FILES = st.sampled_from(["0.png", "1.png", "0.txt", "metadata.jsonl"])


@settings(max_examples=400)
@given(
    changes=st.lists(st.tuples(FILES, CHANGES), max_size=4, unique_by=lambda c: c[0]),
    lines=st.none() | st.lists(LINES, min_size=1, max_size=6),
    policy=st.sampled_from(["stop", "skip"]),
    follow=st.booleans(),
    split=st.sampled_from([0.0, 0.3]),
)
def test_any_dataset_is_trained_on_or_refused_in_words(
    tmp_path_factory, accelerator, batches_of, changes, lines, policy, follow, split
):
    folder = tmp_path_factory.getbasetemp() / "mutated" / "data"
    make_dataset(folder)
    if lines is not None or "metadata.jsonl" in dict(changes):
        good = json.dumps({"file_name": "2.png", "text": "fine"}).encode()
        (folder / "metadata.jsonl").write_bytes(b"\n".join([*(lines or []), good]))
    for name, (kind, value) in changes:
        change(folder / name, kind, value)
    options = TrainOptions(dataset_dir=folder, output_dir=folder, on_bad_data=policy, follow_symlinks=follow)
    options = replace(options, validation_split=split)
    try:
        data = read_training_data(options, accelerator)
    except CaptionTrainError as error:
        assert str(error) and all(line.isprintable() for line in str(error).splitlines())
        return
    assert policy == "skip" or not data.skipped
    outside = folder.parent / "outside"
    assert follow or not any(pair.image.resolve().is_relative_to(outside) for pair in data.train)
    try:
        check_prompts(get_family("florence"), data.train)
    except UsageError as error:
        # As in a run, before a model is loaded: a task with more text, for example.
        assert str(error).startswith("metadata.jsonl:")
        return
    if any(len(pair.prompt or "") > 1000 for pair in data.train):
        # Longer than the model has positions: refused by name before training starts.
        with pytest.raises(UsageError, match="--prompt"):
            batches_of(data.train)
        return
    for batch in batches_of(data.train):
        assert batch.label_tokens and not batch.errors and batch.inputs["labels"].shape[1] <= 16

"""`--cache_features`: a model that is given the features of images trains and captions as with the images."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from caption_train.config.training import TrainOptions
from caption_train.data.images import open_image
from caption_train.errors import UsageError
from caption_train.families import get_family
from caption_train.families.vlm.features.encoder import find_image_encoder
from caption_train.features.opening import Opening
from caption_train.features.source import FeatureCollator, attach_rows
from caption_train.system.files import hash_file
from caption_train.training.model import resolve_options
from tests.fixtures.vlm import KINDS

TYPES = [kind for kind in KINDS if kind not in ("llava_vicuna", "joycaption")]
SIZES = [(96, 64), (40, 140), (64, 64)]
CAPTIONS = ["a red boat", "two small dogs on a hill", "x"]
FAMILY = get_family("vlm")


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{number}.png" for number in range(len(SIZES))]
    for path, (width, height) in zip(paths, SIZES, strict=True):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return paths


@pytest.fixture
def open_kind(tiny_base, images):
    """`open_kind("llava", dtype)`: a model, and everything of a run that keeps its features."""

    def run(kind, dtype=torch.float32, around=nullcontext, limit=None):
        model, processor = FAMILY.load(str(tiny_base(f"vlm/{kind}")), dtype=dtype)
        FAMILY.configure(processor, {"max_pixels": None})
        plain = FAMILY.make_collator(processor, prompt="Describe.", max_length=32)
        digests = {path: hash_file(path) for path in images}
        opening = Opening(
            model, FAMILY, processor, digests, "Describe.", precision="no", around=around, limit=limit
        )
        opening.prepare()
        keeping, line = opening.start()
        return SimpleNamespace(
            model=model, processor=processor, plain=plain, keeping=keeping, line=line, around=around,
            collate=FeatureCollator(FAMILY, plain), images=images,
        )  # fmt: skip

    return run


def measure_loss(run, places, *, is_kept: bool) -> float:
    """Return the loss of a batch of images by their places, from features or from pixels."""
    open_item = run.keeping.source.open if is_kept else lambda path: {"image": open_image(path)}
    items = [open_item(run.images[place]) | {"caption": CAPTIONS[place]} for place in places]
    batch = (run.collate if is_kept else run.plain)(items)
    dtype = next(run.model.parameters()).dtype
    with torch.no_grad(), run.around(), run.keeping.encoder.given(batch) as batch:
        batch = {n: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for n, v in batch.items()}
        return run.model(**batch).loss.item()


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, "float32") for kind in TYPES),
        *(
            (kind, precision)
            for kind in ("qwen3_vl", "smolvlm", "gemma3")
            for precision in ("bfloat16", "autocast")
        ),
    ],
)
def test_alone_an_image_has_the_same_loss_bit_for_bit(open_kind, kind, precision):
    around = partial(torch.autocast, "cpu", torch.bfloat16) if precision == "autocast" else nullcontext
    run = open_kind(kind, torch.bfloat16 if precision == "bfloat16" else torch.float32, around)
    for place in range(len(SIZES)):
        losses = [measure_loss(run, [place], is_kept=is_kept) for is_kept in (False, True, True)]
        assert losses[0] == losses[1] == losses[2] and math.isfinite(losses[0])
    assert run.keeping.encoder.computed == len(SIZES)


@pytest.mark.parametrize("kind", TYPES)
def test_in_a_batch_images_of_all_sizes_keep_their_places(open_kind, kind):
    run = open_kind(kind)
    places = [2, 0, 1]
    plain = measure_loss(run, places, is_kept=False)
    for kept in ([], [0], [0, 1, 2]):
        for place in kept:
            measure_loss(run, [place], is_kept=True)
        assert measure_loss(run, places, is_kept=True) == pytest.approx(plain, rel=1e-5)
    assert run.keeping.encoder.computed == len(SIZES)
    assert measure_loss(run, [0, 1, 2], is_kept=True) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "beams"), [*((kind, 1) for kind in TYPES), ("qwen3_vl", 2), ("internvl", 2), ("llava", 2)]
)
def test_captions_are_those_of_the_images(open_kind, kind, beams):
    run, prompts = open_kind(kind), ["Describe.", "What is it, in a few words?", "Describe."]
    plain = FAMILY.encode(run.processor, [open_image(path) for path in run.images], prompts)
    settings = {"num_beams": beams, "max_new_tokens": 6}
    found = [FAMILY.generate(run.model, run.processor, plain, **settings)]
    for _ in range(2):
        items = [run.keeping.source.open(path) for path in run.images]
        batch = FAMILY.encode(run.processor, [item["image"] for item in items], prompts)
        with run.keeping.encoder.given(attach_rows(FAMILY, batch, items)) as batch:
            found.append(FAMILY.generate(run.model, run.processor, batch, **settings))
    assert found[0] == found[1] == found[2]
    assert run.keeping.encoder.computed == len(SIZES)


def test_an_image_made_smaller_for_a_long_prompt_is_not_kept_nor_given_kept_features(open_kind, images):
    """How many tokens such an image has depends on the prompt that it was made smaller for."""
    Image.radial_gradient("L").resize((128, 128)).convert("RGB").save(images[0])
    run = open_kind("qwen3_vl")
    run.processor.tokenizer.model_max_length = 42
    run.processor.rows.clear()

    def lose(prompt):
        items = [run.keeping.source.open(run.images[0]) | {"caption": "x", "prompt": prompt}]
        with torch.no_grad(), run.keeping.encoder.given(run.collate(items)) as batch:
            return batch["input_ids"].shape[1], run.model(**batch).loss.item()

    long = "a " * 8
    first = lose(long)
    assert first[0] <= 42 and run.keeping.encoder.computed == 0
    kept = lose("a")
    assert run.keeping.encoder.computed == 1 and lose("a") == kept
    assert lose(long) == first and run.keeping.encoder.computed == 1


def test_a_projector_cannot_be_trained_on_what_it_made(tiny_base):
    options = TrainOptions(
        model_id=str(tiny_base("vlm/llava")), cache_features=True, train_parts=["projector", "language"]
    )
    with pytest.raises(UsageError, match=r"^--cache_features keeps .*: leave projector out of --train_parts"):
        resolve_options(options, FAMILY)
    assert resolve_options(replace(options, train_parts=[]), FAMILY)[0].train_parts == ["language"]


class Reads(torch.nn.Module):
    """A model whose type reads more of its encoder than embeddings."""

    config = SimpleNamespace(model_type="odd")

    def forward(self, mm_encoder_outputs=None):
        return mm_encoder_outputs["image"].last_hidden_state

    def get_image_features(self): ...


class TakesNone(Reads):
    def forward(self, pixel_values=None): ...


@pytest.mark.parametrize("model", [Reads(), TakesNone()])
def test_a_type_that_cannot_be_given_features_is_named(model):
    model.base_model = model
    with pytest.raises(UsageError, match=r"--cache_features: an? odd model cannot be given kept features"):
        find_image_encoder(model)


def test_a_model_that_reads_its_images_in_another_way_too_is_named(open_kind, monkeypatch):
    run = open_kind("llava")
    real = type(run.model).forward

    @wraps(real)
    def forward(self, pixel_values=None, mm_encoder_outputs=None, **batch):
        output = real(self, pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs, **batch)
        output.logits *= 1 if pixel_values is None else 2
        return output

    monkeypatch.setattr(type(run.model), "forward", forward)
    with pytest.raises(UsageError, match="a llava model reads features that it is given in another way"):
        open_kind("llava")


def test_what_features_need_is_about_what_is_said_before(open_kind):
    for kind in ("qwen3_vl", "smolvlm", "llava"):
        run = open_kind(kind)
        said = float(run.line.split()[2])
        for place in range(len(SIZES)):
            measure_loss(run, [place], is_kept=True)
        store = run.keeping.encoder.store
        numbers = sum(
            tensor.nbytes for digest in run.keeping.source.digests.values()
            for name, tensor in store.read(digest).items() if name != "image_size"
        )  # fmt: skip
        assert "about" in run.line and abs(said * 1e6 - numbers) < 0.2 * numbers + 1e5

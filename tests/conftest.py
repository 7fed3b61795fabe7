"""What tests share: tiny bases, four captioned pictures, LoRAs trained on them. Nothing asks the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors gain nothing from threads, and two busy test runs on a few cores lose a factor of ten by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import shutil
import sys
from functools import cache

import hypothesis
import pytest

from caption_train.errors import UsageError
from tests.fixtures.browser import SECONDS
from tests.fixtures.once import make_once
from tests.fixtures.order import place_of
from tests.fixtures.sample_set import CAPTIONS

SAME = {"vlm": "vlm/qwen3_vl"}
"""The kind of checkpoint that stands for a family of many."""

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place_of(item.path.stem))


def pytest_collection_finish():
    """Spare the garbage collector, here and in forked processes, the objects of what was imported by now."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What runs leave for later runs does not go into the user's cache, and is not read from there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_curves():
    """A run's picture takes half a second, which hundreds of runs would add; its own tests draw it."""
    if "torch" not in sys.modules:
        yield
        return
    from caption_train.system.files import write_atomically
    from caption_train.training import saving
    from caption_train.training.monitor.curve import CURVE_FILE

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            saving, "draw_curve", lambda folder, *_: write_atomically(folder / CURVE_FILE, b"not drawn")
        )
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """`tiny_base("blip")`: the folder of a family's tiny base; what is not in examples/ is made once."""
    from tests.fixtures.bases import find_base, save_tiny_base

    def find(family):
        name = f"{family.replace('/', '-')}-tiny"
        base = find_base(family)
        return base or make_once(tmp_path_factory, name, lambda folder: save_tiny_base(family, folder))

    find = cache(find)
    return lambda family: find(SAME.get(family, family))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a BLIP with random weights and no dropout, to compare runs on."""
    from tests.fixtures.runs import save_base

    return save_base("blip", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """A folder of four pictures with captions beside them, file names sorted as in CAPTIONS."""
    from PIL import Image

    def save(folder):
        for index, (colour, caption) in enumerate(CAPTIONS.items()):
            Image.new("RGB", (48, 32), colour).save(folder / f"{index} {colour}.png")
            (folder / f"{index} {colour}.txt").write_text(caption + "\n", encoding="utf-8")

    return make_once(tmp_path_factory, "pairs with spaces", save)


@pytest.fixture(scope="session")
def train(tiny_base, pairs_folder, tmp_path_factory):
    """`train("blip", "--epochs", "2", …)` runs the family's script in this process; returns output_dir."""
    from caption_train.cli.commands import train_main

    def run(family, *flags, output_dir=None):
        output_dir = output_dir or tmp_path_factory.mktemp(f"{family.replace('/', '-')}-lora")
        paths = ["--dataset_dir", pairs_folder, "--output_dir", output_dir, "--model_id", tiny_base(family)]
        assert train_main(family.partition("/")[0], [*map(str, paths), "--device", "cpu", *flags]) == 0
        return output_dir

    return run


@pytest.fixture(scope="session")
def overfitted(train, tmp_path_factory):
    """`overfitted("blip")`: a LoRA that knows the four pictures by heart, trained at the first call."""
    from tests.fixtures.bases import OVERFIT

    flags = ["--batch_size", "4", "--rank", "32", "--dropout", "0", "--seed", "0"]
    # Only at the end: a save takes longer than many steps.
    flags += ["--save_every_n_steps", "999"]

    def find(family):
        name, learn = f"{family.replace('/', '-')}-lora", OVERFIT[family.partition("/")[0]]
        return make_once(
            tmp_path_factory, name, lambda folder: train(family, *flags, *learn, output_dir=folder)
        )

    find = cache(find)
    return lambda family: find(SAME.get(family, family))


@pytest.fixture
def parsed(monkeypatch):
    """Make the entry points stop when their flags are read; `parsed[-1]` are the options they were given."""
    from caption_train.cli import commands

    options, parse = [], commands.parse_options

    def parse_and_stop(*args, **keywords):
        options.append(parse(*args, **keywords))
        raise UsageError("stopped after the flags")

    monkeypatch.setattr(commands, "parse_options", parse_and_stop)
    return options


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for the tests of pages."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    # Not kept for the session: while Playwright runs, no test of this process could use asyncio.
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_file(browser):
    """`open_file(path, color_scheme=…)` opens a page from disk; any error or request fails the test."""
    contexts, wrong = [], []

    def open_file(path, **settings):
        settings = {"viewport": {"width": 1280, "height": 900}, **settings}
        contexts.append(browser.new_context(**settings))
        contexts[-1].set_default_timeout(SECONDS * 1000)
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url),
        )
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert wrong == []

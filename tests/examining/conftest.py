"""A folder with one of everything that the page names, and what its page says."""

import re
from dataclasses import dataclass
from html import unescape

import pytest

from caption_train.compiling.compile import compile_folder
from caption_train.config.compiling import CompileOptions
from tests.fixtures.photos import draw_photo


@dataclass
class Page:
    """text: the HTML. options: what it was made with."""

    text: str
    options: CompileOptions

    def section(self, key):
        """Return the HTML of a finding's section; "" where there is none."""
        found = re.search(rf'<section aria-labelledby="{key}">(.*?)</section>', self.text, re.DOTALL)
        return found[1] if found else ""

    def names(self, key):
        return [unescape(name) for name in re.findall(r'<p class="name">(.*?)</p>', self.section(key))]

    def notes(self, key):
        return [unescape(note) for note in re.findall(r'<p class="measured">(.*?)</p>', self.section(key))]

    def titles(self, key):
        return [unescape(title) for title in re.findall(r"<h3>(.*?)</h3>", self.section(key))]

    def counts(self):
        rows = re.findall(r'<th scope="row">(.*?)</th><td class="number">([\d,]+)</td>', self.text)
        return {unescape(label): int(count.replace(",", "")) for label, count in rows}


@pytest.fixture(autouse=True)
def extra():
    pytest.importorskip("imagehash", reason="the extra is not installed: pip install '.[report]'")


@pytest.fixture
def add(tmp_path):
    """`add("a.png", "a caption", seed)` writes a picture, with its caption if there is one."""
    folder = tmp_path / "images"
    folder.mkdir()

    def add(name, caption=None, seed=None, size=(320, 256), **settings):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        seed = len(list(folder.rglob("*"))) + 1000 if seed is None else seed
        draw_photo(seed, size).save(path, **settings)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    add.folder = folder
    return add


@pytest.fixture
def examine(add, tmp_path):
    """`examine(…)` compiles the folder with a page, and returns the page."""

    def examine(output_dir=None, **flags):
        options = CompileOptions(add.folder, output_dir, report=tmp_path / "dataset.html", **flags)
        assert options.check() == []
        compile_folder(options)
        return Page(options.report.read_text("utf-8"), options)

    return examine

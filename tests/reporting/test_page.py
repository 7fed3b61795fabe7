"""The page of a report: one file, nothing in it can run but its own script, small enough to hand on."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re
import time

import pytest

from caption_train.data.images import open_image
from caption_train.reporting import thumbnails
from caption_train.reporting.page import dump_json, read_gallery, render_report, write_report
from caption_train.reporting.report import Answer, Item, Report
from caption_train.reporting.thumbnails import MOST_BYTES, make_thumbnails, shrink
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.reports import HOSTILE, make_report, write_noise


class Elements(html.parser.HTMLParser):
    """Collects start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.inline, self.inside = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.inline.append((self.inside, data))


@pytest.fixture(scope="module")
def page():
    return render_report(make_report())


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in Elements(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not attributes.keys() & {"src", "style", "srcset", "action", "background"}
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page and "url(" not in page


def test_the_policy_allows_the_one_script_and_style_by_their_hashes(page):
    (policy,) = [a["content"] for tag, a in Elements(page).tags if a.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert "unsafe" not in policy and "http" not in policy
    for tag, name in ("style", "style-src"), ("script", "script-src"):
        texts = [text for kind, text in Elements(page).inline if kind == tag]
        hashed = base64.b64encode(hashlib.sha256(texts[-1].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{hashed}'"


def test_captions_are_text_whatever_they_say(page):
    tags = [tag for tag, _ in Elements(page).tags]
    assert tags.count("script") == 2 and "b" not in tags
    gallery = re.search('id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert not set("<>&\u2028") & set(gallery)
    answers = [item["answers"][2][0] for item in json.loads(gallery)["items"]]
    assert answers[: len(HOSTILE)] == list(HOSTILE)
    assert "&lt;b&gt;blip&lt;/b&gt;" in page and "A note &amp; &lt;more&gt;." in page


def test_json_in_a_page_is_the_same_json():
    value = {"a": list(HOSTILE), "</script>": 1}
    assert json.loads(dump_json(value)) == value
    dump_json(value).encode()


def test_the_gallery_can_be_read_back(tmp_path):
    write_report(tmp_path / "report.html", make_report(8))
    gallery = read_gallery(tmp_path / "report.html")
    assert gallery["columns"] == ["base", "my-style", "my-style-2 <script>"]
    assert [item["answers"][2][0] for item in gallery["items"]][: len(HOSTILE)] == list(HOSTILE)
    (tmp_path / "report.html").write_text('<script type="application/json" id="data">[1</script>')
    assert read_gallery(tmp_path / "report.html") == read_gallery(tmp_path / "none.html") == {}


def test_an_empty_report_is_a_page_too():
    page = render_report(Report("nothing <yet>"))
    assert "nothing &lt;yet&gt;" in page and 'id="gallery"' not in page


def test_a_thousand_images_stay_below_20_megabytes(tmp_path):
    # Noise is what compresses worst. Forty pictures of it stand for a thousand.
    paths = write_noise(tmp_path / "noise", 40)
    made = [shrink(open_image(path), MOST_BYTES // 1000) for path in paths]
    assert all(made)
    caption = "a long caption of a picture, " * 10
    items = [
        Item(f"{number}.png", [caption], [Answer(caption, (), {"cider": 0.5})] * 4, made[number % 40])
        for number in range(1000)
    ]
    report = dataclasses.replace(make_report(1), items=items, columns=["base", "a", "b", "c"], rows=[])
    started = time.monotonic()
    content = render_report(report).encode()
    assert 5e6 < len(content) < 20e6
    assert time.monotonic() - started < 10


def test_more_images_get_smaller_pictures(tmp_path, monkeypatch):
    paths = write_noise(tmp_path / "noise", 2)
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 8_000)
    assert sum(len(thumbnail.address) for thumbnail in make_thumbnails(paths)) <= 8_000


def test_script_style_and_template_are_in_the_wheel():
    import tomllib

    packaged = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert set(packaged["caption_train.reporting"]) == {"*.html", "*.css", "*.js"}
    folder = REPOSITORY / "caption_train/reporting"
    suffixes = {path.suffix for path in folder.iterdir() if path.is_file()}
    assert suffixes == {".py", ".html", ".css", ".js"}

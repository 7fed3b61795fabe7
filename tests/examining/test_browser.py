"""The page of a dataset in a real browser: nothing in it runs, it is readable, its links open the image."""

import json
import os
import sys

import pytest

from caption_train.compiling.compile import compile_folder
from caption_train.config.compiling import CompileOptions
from tests.fixtures.browser import find_violations
from tests.fixtures.reports import HOSTILE

NAMES = ("<script>window.hacked=1<&>.png", "<img src=x onerror=window.hacked=2>.png", "\"'>{{7*7}}.png")


@pytest.fixture
def report(add, tmp_path, tiny_base):
    """A page with every finding, and captions and names that try to become code."""
    for number, caption in enumerate(HOSTILE[:5]):
        add(f"{number}.png", caption, size=(100, 80))
    for number, name in enumerate(NAMES if sys.platform != "win32" else ()):
        add(name.replace("/", ""), f"<b>{number}</b>, same", seed=7, size=(900, 200))
        add(f"{number} {name}", "the same, <i>again</i>")
    if sys.platform == "linux":
        add(os.fsdecode(b"caf\xe9.png"))
    add("long.png", "</s> word, " * 200)
    (add.folder / "broken <script>window.hacked=3<&>.png").write_bytes(b"<svg onload=window.hacked=4>")
    base = str(tiny_base("blip"))
    options = CompileOptions(
        add.folder, report=tmp_path / "x.html", family="blip", model_id=base, max_length=20
    )
    compile_folder(options)
    return options.report


def test_names_and_captions_are_shown_and_never_run(open_file, report):
    page = open_file(report)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main b, main i, main img[src=x]").count() == 0
    texts = page.locator("#captionless, .cards .name, .cards .caption").all_inner_texts()
    assert any("<script>window.hacked" in text for text in texts)
    assert any("<b>0</b>, same" in text for text in texts)
    assert any("{{ 7 * 7 }}" in text for text in texts)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(open_file, report, width, scheme):
    page = open_file(report, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.wait_for_timeout(200)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for _ in range(2):
        assert find_violations(page) == []
        page.keyboard.press("?")
        assert page.locator("#keys").is_visible()


def test_pictures_come_as_they_are_needed(open_file, add, tmp_path):
    for number in range(40):
        add(f"{number}.png", size=(200, 150))
    options = CompileOptions(add.folder, report=tmp_path / "x.html", dry_run=True)
    compile_folder(options)
    page = open_file(options.report, viewport={"width": 390, "height": 600})
    page.wait_for_timeout(200)
    # Each image is named twice, as tiny and as without a caption; its picture is in the page once.
    assert page.locator("img[data-picture]").count() == 80
    assert page.evaluate("page.data.pictures.length") == 40
    assert page.locator("img[src]").count() < 20
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(300)
    assert 0 < page.locator("img[src]").count() < 60
    assert page.evaluate(
        "[...document.images].filter(i => i.src && i.complete).every(i => i.naturalWidth > 0)"
    )


def test_keys_go_from_section_to_section(open_file, report):
    page = open_file(report)
    focused = "document.activeElement.id"
    for expected in ("findings", "counts", "lengths"):
        page.keyboard.press("j")
        assert page.evaluate(focused) == expected
    page.keyboard.press("k")
    assert page.evaluate(focused) == "counts"
    page.keyboard.press("t")
    assert "light" in page.locator("#theme").inner_text()
    page.get_by_text("The review page is at another address").click()
    page.fill("#address", "jkt?")
    assert "light" in page.locator("#theme").inner_text()


def test_only_a_web_address_becomes_a_link(open_file, report):
    page = open_file(report)
    page.get_by_text("The review page is at another address").click()
    link = page.locator("a.review").first
    before = link.get_attribute("href")
    assert before.startswith("http://127.0.0.1:7860/#item=")
    for bad in ("javascript:window.hacked=1", "file:///etc/passwd", "nonsense", ""):
        page.fill("#address", bad)
        assert link.get_attribute("href") == before
    page.fill("#address", "http://192.168.0.7:7000/?token=abc")
    assert link.get_attribute("href") == f"http://192.168.0.7:7000/?token=abc#{before.partition('#')[2]}"


def test_without_scripts_everything_but_pictures_is_there(browser, report):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(report.as_uri())
    assert page.locator("main h2").count() >= 9 and page.locator("figure svg").count() == 3
    assert "scripts are turned off" in page.locator("noscript").inner_text()


def test_a_link_opens_the_image_in_the_review_page(browser, add, tmp_path, monkeypatch):
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="the review page's extra is not installed: pip install '.[review]'")
    from tests.fixtures.review_page import run_page

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(5):
        add(f"{number}.png", f"caption {number}")
    add("sub/a #1.png", "cut</s>")
    options = CompileOptions(add.folder, report=tmp_path / "x.html")
    compile_folder(options)
    with run_page(add.folder, monkeypatch) as running:
        context = browser.new_context()
        page, wrong = context.new_page(), []
        page.goto(options.report.as_uri())
        page.get_by_text("The review page is at another address").click()
        page.fill("#address", running.address)
        with context.expect_page() as opened:
            page.get_by_role("link", name="Review sub/a #1.png").click()
        tab = opened.value
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.wait_for_selector("#single:not([hidden])")
        tab.wait_for_selector("#name:not(:empty)")
        assert tab.text_content("#name") == "sub/a #1.png"
        assert tab.input_value("#caption") == "cut</s>"
        tab.goto(f"{running.address}/#item={'0' * 24}")
        tab.wait_for_timeout(300)
        assert "is not in the folder that this page shows" in tab.text_content("#message")
        # A second link in the same tab, whatever the filters hide.
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#overview:not([hidden])")
        tab.fill("#contains", "nothing has this")
        tab.wait_for_selector("#nothing:not([hidden])")
        tab.evaluate(f"location.hash = 'item={running.id_of('2.png')}'")
        tab.wait_for_selector("#single:not([hidden])")
        tab.wait_for_timeout(200)
        assert tab.text_content("#name") == "2.png"
        assert json.dumps(wrong) == "[]"
        context.close()

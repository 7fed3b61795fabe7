"""The page in a real browser: it works from disk, by mouse and by key, and nothing in it can run."""

import json

import pytest

from caption_train.reporting.page import write_report
from tests.fixtures.browser import AXE, find_violations, until
from tests.fixtures.reports import HOSTILE, make_report

COUNT = 100


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_report(COUNT))
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A report with one of everything that a card can show."""
    path = tmp_path_factory.mktemp("report") / "few.html"
    write_report(path, make_report(12))
    return path


@pytest.fixture
def open_page(open_file, report):
    """`open_page(color_scheme=…)` opens the report; the test fails on any error or request."""
    return lambda path=report, **settings: open_file(path, **settings)


def count(page):
    return page.locator("#count").inner_text()


def names(page):
    return page.locator("#gallery h3").all_inner_texts()


def test_captions_are_shown_and_never_run(open_page):
    page = open_page()
    page.wait_for_selector("#gallery > li:nth-child(40)")
    # Whatever would run by itself has run when two more frames are drawn.
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("window.hacked") is None
    texts = page.locator("#gallery > li .captions > div:last-child dd")
    # As JSON, since a lone surrogate would not come through the wire.
    shown = texts.evaluate_all("all => all.map(element => JSON.stringify(element.textContent))")
    assert [json.loads(text) for text in shown[: len(HOSTILE)]] == list(HOSTILE)
    assert page.locator("#gallery script, #gallery svg, #gallery img[src=x]").count() == 0


def test_filters_say_how_many_are_left(open_page):
    page = open_page()
    assert count(page) == f"{COUNT} images"
    # Each number differs from the one before, so that what is waited for is new.
    expected = {"empty": 5, "worst": 10, "repeats": 5, "best": 10, "cut": 5, "changed": 100, "worst ": 10}
    for choice, number in expected.items():
        page.select_option("#show", choice.strip())
        until(lambda number=number: count(page).split(" ")[0] == str(number), lambda: count(page))
    page.select_option("#model", "0")
    page.select_option("#show", "same")
    until(lambda: count(page) == f"{COUNT} images")


def test_one_image_is_no_plural(open_page, tmp_path):
    write_report(tmp_path / "report.html", make_report(1))
    assert count(open_page(tmp_path / "report.html")) == "1 image"


def test_search_finds_words_of_any_column(open_page):
    page = open_page()
    page.fill("#search", "teal square")
    until(lambda: 0 < int(count(page).split(" ")[0]) < COUNT)
    assert all("teal" in text for text in page.locator("#gallery > li").all_inner_texts())
    page.fill("#search", "0042.png")
    until(lambda: names(page) == ["0042.png"])
    page.fill("#search", "<script>")
    until(lambda: count(page).startswith("3 of "))


def test_the_order_follows_the_scores(open_page):
    def scores():
        shown = page.locator("#gallery > li .captions > div:last-child .score").all_inner_texts()
        return [float(text.split()[-1]) for text in shown]

    page = open_page()
    assert scores() != sorted(scores(), reverse=True)
    page.select_option("#sort", "best")
    until(lambda: len(scores()) >= 40 and scores() == sorted(scores(), reverse=True), scores)
    page.select_option("#sort", "given")
    until(lambda: names(page)[:2] == ["0000.png", "0001.png"])
    page.select_option("#sort", "gain")
    until(lambda: names(page)[0] != "0000.png")


def test_words_that_differ_are_marked(open_page):
    page = open_page()
    card = page.locator("#gallery > li").first
    base = card.locator(".captions > div").nth(1)
    assert base.locator("mark").all_inner_texts() == ["a", "picture", "of", "a"]
    page.select_option("#against", "")
    until(lambda: page.locator("#gallery mark").count() == 0)


def test_columns_can_be_hidden(open_page):
    page = open_page()
    first = page.locator("#gallery > li").first.locator(".captions > div")
    assert first.count() == 4
    page.get_by_label("base", exact=True).uncheck()
    assert first.count() == 3


def test_keys_move_search_and_explain(open_page):
    page = open_page()
    page.keyboard.press("j")
    page.keyboard.press("j")
    focused = "document.activeElement.querySelector('h3').textContent"
    assert page.evaluate(focused) == "0001.png"
    page.keyboard.press("k")
    assert page.evaluate(focused) == "0000.png"
    for _ in range(60):
        page.keyboard.press("j")
    assert page.evaluate(focused) == "0060.png"
    page.keyboard.press("/")
    page.keyboard.type("jk?")
    assert page.input_value("#search") == "jk?"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()
    page.keyboard.press("t")
    assert "light" in page.locator("#theme").inner_text()


def test_pictures_come_as_they_are_needed(open_page):
    page = open_page()
    page.wait_for_selector("#gallery img[src]")
    loaded = page.locator("#gallery img[src]").count()
    assert 0 < loaded < 20
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    until(lambda: page.locator("#gallery > li").count() > 40)
    until(lambda: page.locator("#gallery img[src]").count() > loaded)
    assert page.evaluate(
        "[...document.images].filter(i => i.src && i.complete).every(i => i.naturalWidth > 0)"
    )


# Colours do not depend on the width, nor the layout on the colours.
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here")
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(open_page, few, width, scheme):
    page = open_page(few, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.wait_for_selector("#gallery > li:nth-child(12)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert find_violations(page) == []
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")
    assert find_violations(page) == []


def test_the_theme_can_be_chosen(open_page):
    page = open_page(color_scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate(colour) != light


def test_without_scripts_summary_and_curves_are_there(browser, report):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(report.as_uri())
    assert page.locator("table tbody tr").count() == 2 and page.locator("svg").count() == 3
    assert "scripts are turned off" in page.locator("noscript").inner_text()


def test_a_thousand_images_open_at_once(open_page, tmp_path):
    write_report(tmp_path / "large.html", make_report(1000))
    page = open_page(tmp_path / "large.html")
    assert count(page) == "1000 images"
    assert page.evaluate("performance.getEntriesByType('navigation')[0].domComplete") < 5000
    page.select_option("#sort", "best")
    # The first images have hostile captions, with a score of 0.
    until(lambda: not set(names(page)) & {"0000.png", "0001.png"})
    assert len(names(page)) == 40

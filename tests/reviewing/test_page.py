"""The page in a real browser: headless Chromium through Playwright, skipped where one of them is absent."""

import json
import os
import re
import sys
import time

import pytest

from tests.fixtures.browser import AXE, SECONDS, find_violations, until
from tests.fixtures.fake_family import FakeFamily
from tests.fixtures.paths import REPOSITORY
from tests.fixtures.sample_set import write_image


@pytest.fixture
def open_page(browser):
    """`open_page(running)` opens the page; what its console says that is wrong fails the test."""
    contexts, wrong = [], []

    def start(running, width=1280, height=800, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        context.set_default_timeout(SECONDS * 1000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(running.address)
        tab.wait_for_selector(".cell .words:not(:empty)")
        return tab

    start.wrong = wrong
    yield start
    for context in contexts:
        context.close()
    assert wrong == []


def open_first(tab):
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#single:not([hidden])")
    wait(tab, "document.getElementById('name').textContent")


def wait(tab, expression):
    until(lambda: tab.evaluate(expression), lambda: (expression, tab.text_content("#message")))


def says(tab, text):
    wait(tab, f"document.getElementById('message').textContent.includes({json.dumps(text)})")


def forgive(open_page, status):
    """Drop the console's lines about an answer that the test asked for."""
    assert any(f"status of {status}" in line for line in open_page.wrong)
    open_page.wrong[:] = [line for line in open_page.wrong if f"status of {status}" not in line]


def test_a_caption_is_edited_with_the_keyboard_alone(serve, folder, open_page):
    tab = open_page(serve(folder))
    open_first(tab)
    tab.keyboard.press("e")
    tab.keyboard.press("Control+a")
    tab.keyboard.type("a dark cat")
    tab.keyboard.press("Control+Enter")
    wait(tab, "document.getElementById('name').textContent === 'b.png'")
    assert (folder / "a.txt").read_text() == "a dark cat\n"
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#overview:not([hidden])")
    wait(tab, "document.querySelector('.cell .badges').textContent.includes('accepted')")
    assert tab.text_content("#counts").startswith("1 of 4 accepted")


def test_the_caption_that_was_typed_is_saved_when_the_next_image_is_shown(serve, folder, open_page):
    tab = open_page(serve(folder))
    open_first(tab)
    tab.fill("#caption", "typed")
    tab.click("#next")
    wait(tab, "document.getElementById('name').textContent === 'b.png'")
    assert (folder / "a.txt").read_text() == "typed\n"


def test_suggestions_are_made_again_rejected_edited_and_accepted(serve, folder, open_page):
    tab = open_page(serve(folder, fake=FakeFamily()))
    open_first(tab)
    tab.keyboard.press("g")
    wait(tab, "document.getElementById('suggestion').textContent === 'say dark'")
    tab.keyboard.press("n")
    assert tab.text_content("#suggestion") == "" and tab.is_disabled("#take")
    tab.fill("#prompt", "describe")
    tab.click("#suggest")
    wait(tab, "document.getElementById('suggestion').textContent === 'describe dark'")
    tab.keyboard.press("i")
    assert tab.input_value("#caption") == "describe dark"
    tab.keyboard.type(" cat")
    tab.keyboard.press("Control+s")
    says(tab, "Saved")
    assert (folder / "a.txt").read_text() == "describe dark cat\n"
    tab.keyboard.press("Escape")
    tab.keyboard.press("y")
    says(tab, "Saved and accepted")
    assert (folder / "a.txt").read_text() == "describe dark\n"
    tab.fill("#temperature", "1")
    tab.fill("#beams", "4")
    tab.click("#suggest")
    says(tab, "give one")
    forgive(open_page, 422)
    tab.fill("#beams", "")
    tab.click("#suggest")
    wait(tab, "document.getElementById('message').textContent === ''")


@pytest.mark.parametrize("answer", ["#keep-theirs", "#write-mine"])
def test_a_conflict_shows_both_texts(serve, folder, open_page, answer):
    tab = open_page(serve(folder))
    open_first(tab)
    (folder / "a.txt").write_text("from an <i>editor</i>\n")
    tab.fill("#caption", "mine")
    tab.keyboard.press("Control+s")
    tab.wait_for_selector("#conflict:not([hidden])")
    assert (tab.text_content("#theirs"), tab.text_content("#yours")) == ("from an <i>editor</i>", "mine")
    assert (folder / "a.txt").read_text() == "from an <i>editor</i>\n"
    forgive(open_page, 409)
    tab.fill("#caption", "mine, edited")
    tab.click(answer)
    tab.wait_for_selector("#conflict", state="hidden")
    expected = "mine, edited" if answer == "#write-mine" else "from an <i>editor</i>"
    assert tab.input_value("#caption") == expected
    assert (folder / "a.txt").read_text() == f"{expected}\n"
    # The buttons are gone; whoever works with keys or listens goes on in the caption.
    assert tab.evaluate("document.activeElement.id") == "caption"


def test_two_tabs_do_not_write_over_each_other(serve, folder, open_page):
    running = serve(folder)
    first, second = open_page(running), open_page(running)
    for tab in (first, second):
        open_first(tab)
    first.fill("#caption", "first")
    first.keyboard.press("Control+s")
    says(first, "Saved")
    second.fill("#caption", "second")
    second.keyboard.press("Control+s")
    second.wait_for_selector("#conflict:not([hidden])")
    forgive(open_page, 409)
    assert second.text_content("#theirs") == "first"
    assert (folder / "a.txt").read_text() == "first\n"


def test_an_edit_is_undone_on_the_page_after_a_restart(serve, folder, open_page):
    running = serve(folder)
    running.save("a.png", "cat, sofa", "changed")
    tab = open_page(serve(folder))
    assert "changed" in tab.text_content(".cell")
    tab.keyboard.press("h")
    tab.wait_for_selector("#history[open]")
    assert "a.png" in tab.text_content("#history-list")
    tab.keyboard.press("Escape")
    tab.keyboard.press("u")
    says(tab, "Undone edit: 1 captions")
    assert (folder / "a.txt").read_text() == "cat, sofa\n"
    wait(tab, "document.querySelector('.cell .words').textContent === 'cat, sofa'")
    assert tab.is_disabled("#do-undo")


def test_undoing_does_not_throw_away_what_was_typed(serve, folder, open_page):
    running = serve(folder)
    running.save("b.png", "cat, window, morning light", "changed")
    tab = open_page(running)
    open_first(tab)
    tab.fill("#caption", "typed")
    tab.click("#do-undo")
    says(tab, "Save what you typed first")
    assert tab.input_value("#caption") == "typed" and (folder / "b.txt").read_text() == "changed\n"


def test_filters_and_selection_with_the_keyboard(serve, folder, open_page):
    tab = open_page(serve(folder))
    tab.keyboard.press("/")
    tab.keyboard.type("morning")
    wait(tab, "document.getElementById('found').textContent === '1 shown'")
    tab.fill("#contains", "")
    tab.select_option("#state", "copies")
    wait(tab, "document.getElementById('found').textContent === '2 shown'")
    tab.select_option("#state", "")
    tab.fill("#longer", "99")
    tab.wait_for_selector("#nothing:not([hidden])")
    tab.fill("#longer", "")
    wait(tab, "document.getElementById('found').textContent === '4 shown'")
    tab.focus("#grid")
    tab.keyboard.press("Home")
    tab.keyboard.press("Shift+ArrowRight")
    assert tab.text_content("#selected") == "2 selected"
    tab.keyboard.press("f")
    wait(tab, "document.querySelectorAll('.flagged').length === 2")
    tab.keyboard.press("Escape")
    tab.keyboard.press("End")
    tab.keyboard.press(" ")
    assert tab.get_attribute("#cell-3", "aria-selected") == "true"
    assert tab.get_attribute("#grid", "aria-activedescendant") == "cell-3"


def test_find_and_replace_shows_what_changes_and_is_undone(serve, folder, open_page):
    tab = open_page(serve(folder))
    tab.keyboard.press("r")
    tab.wait_for_selector("#replace[open]")
    tab.keyboard.type("cat")
    tab.fill("#with", "dog")
    wait(tab, "document.getElementById('replace-count').textContent.startsWith('3 captions')")
    assert tab.text_content("#replace-preview li:first-child del") == "cat"
    assert (folder / "a.txt").read_text() == "cat, sofa\n"
    tab.click("#replace-go")
    says(tab, "Replaced: 3 captions")
    assert (folder / "a.txt").read_text() == "dog, sofa\n"
    tab.keyboard.press("u")
    says(tab, "Undone replace: 3 captions")
    assert (folder / "a.txt").read_text() == "cat, sofa\n"


def test_tags_are_chips_that_are_added_with_help_and_removed(serve, folder, open_page):
    tab = open_page(serve(folder))
    open_first(tab)
    assert tab.locator("#chips li span").all_text_contents() == ["cat", "sofa"]
    tab.keyboard.press("t")
    tab.keyboard.type("win")
    tab.wait_for_selector("#tag-list li")
    assert tab.locator("#tag-list li").all_text_contents() == ["window1"]
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.click("#chips button[aria-label='remove sofa']")
    tab.keyboard.press("Control+s")
    says(tab, "Saved")
    assert (folder / "a.txt").read_text() == "cat, window\n"


def test_it_ends_with_the_command_that_trains_on_what_was_accepted(serve, folder, open_page):
    tab = open_page(serve(folder))
    tab.keyboard.press("Control+a")
    tab.keyboard.press("a")
    wait(tab, "document.getElementById('counts').textContent.startsWith('3 of 4')")
    tab.click("#do-finish")
    tab.wait_for_selector("#finish[open]")
    out = folder.with_name("photos-out")
    assert f"--dataset_dir '{out}'" in tab.text_content("#finish-commands") or str(out) in tab.text_content(
        "#finish-commands"
    )
    assert len((out / "metadata.jsonl").read_text().splitlines()) == 3


def test_every_key_of_the_page_is_in_its_list(serve, folder, open_page):
    tab = open_page(serve(folder))
    tab.keyboard.press("?")
    tab.wait_for_selector("#help[open]")
    shown = " ".join(tab.locator("#keys kbd").all_text_contents()).split()
    script = (REPOSITORY / "caption_train/reviewing/static/app.js").read_text("utf-8")
    tables = re.findall(r"const (?:inSingle|inGrid|anywhere) = \{(.*?)\n\};", script, re.DOTALL)
    keys = {key for table in tables for key in re.findall(r'^  "?([^\s":]+)"?:', table, re.MULTILINE)}
    assert len(keys) > 15
    named = {"ArrowRight": "→", "ArrowLeft": "←", "Escape": "Esc"}
    assert {named.get(key, key) for key in keys} <= set(shown)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_hostile_folder_is_shown_not_run(serve, tmp_path, open_page):
    folder = tmp_path / "hostile"
    evil = "<img src=x onerror=document.title='run'><script>document.title='run'</script>"
    names = [
        "<script>alert(1)<*script>.png",
        "<img src=x onerror=document.title='run'>.png",
        "'\"quotes&amp;.png",
        "new\nline.png",
        "%2e%2e%2fetc.png",
        "up..%5c.png",
        "javascript:1.png",
        os.fsdecode(b"\xff\xfe.png"),
        "‮gnp.png",
    ]
    for number, name in enumerate(names):
        write_image(folder / name, (number * 20, 0, 0), (20, 20 + number))
        (folder / name).with_suffix(".txt").write_text(f"{evil}, \"tag' {number}\n")
    (folder / "out").symlink_to(tmp_path)
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n")
    tab = open_page(serve(folder, fake=FakeFamily()))
    wait(tab, "document.querySelectorAll('.cell img').length >= 9")
    assert tab.locator(".cell").count() == 10
    assert tab.locator(".cell .words").all_text_contents().count("no caption") == 1
    open_first(tab)
    for _ in range(9):
        tab.keyboard.press("j")
    wait(tab, "document.getElementById('place').textContent.startsWith('10')")
    tab.keyboard.press("k")
    wait(tab, "document.getElementById('caption').value.includes('onerror')")
    wait(tab, "document.querySelectorAll('#chips li').length === 2")
    tab.keyboard.press("t")
    tab.wait_for_selector("#tag-list li")
    tab.keyboard.press("Escape")
    for key, dialog in (("r", "replace"), ("h", "history"), ("?", "help")):
        tab.keyboard.press(key)
        tab.wait_for_selector(f"#{dialog}[open]")
        if dialog == "replace":
            tab.keyboard.type("script")
            tab.wait_for_selector("#replace-preview li")
        tab.keyboard.press("Escape")
    assert "run" not in tab.title() and tab.locator("script:not([src])").count() == 0
    # The damaged image has no picture, which the browser's console says.
    forgive(open_page, 422)


# Colours do not depend on the width, nor the layout on the colours.
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here")
def test_axe_finds_nothing_serious(serve, folder, open_page, width, scheme):
    tab = open_page(serve(folder, fake=FakeFamily()), width=width, color_scheme=scheme)
    tab.wait_for_selector(".cell img")
    found = {"grid": find_violations(tab)}
    tab.keyboard.press(" ")
    found["selection"] = find_violations(tab)
    for key, dialog in (("r", "replace"), ("h", "history"), ("?", "help")):
        tab.keyboard.press(key)
        tab.wait_for_selector(f"#{dialog}[open]")
        found[dialog] = find_violations(tab)
        tab.keyboard.press("Escape")
    open_first(tab)
    found["single"] = find_violations(tab)
    tab.focus("#new-tag")
    tab.wait_for_selector("#tag-list li")
    found["tags"] = find_violations(tab)
    (folder / "a.txt").write_text("theirs\n")
    tab.fill("#caption", "mine")
    tab.keyboard.press("Control+s")
    tab.wait_for_selector("#conflict:not([hidden])")
    found["conflict"] = find_violations(tab)
    forgive(open_page, 409)
    assert {place: list_ for place, list_ in found.items() if list_} == {}
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_ten_thousand_images_without_ten_thousand_elements(serve, tmp_path, open_page, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    first = write_image(folder / "0.png", "red", (64, 48))
    for number in range(1, 10_000):
        (folder / f"{number}.png").hardlink_to(first)
        (folder / f"{number}.txt").write_text(f"caption {number}\n")
    running = serve(folder)
    started = time.monotonic()
    tab = open_page(running)
    shown = time.monotonic() - started
    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    assert tab.text_content("#found") == "10,000 shown"
    frames = tab.evaluate(
        """async () => {
          const grid = document.getElementById('grid'), times = [];
          let last = performance.now();
          for (let step = 1; step <= 60; step++) {
            grid.scrollTop = (grid.scrollHeight - grid.clientHeight) * step / 60;
            await new Promise(requestAnimationFrame);
            times.push(performance.now() - last);
            last = performance.now();
          }
          return times;
        }"""
    )
    assert tab.locator(".cell").count() < 120
    wait(tab, "document.querySelector('#cell-9999 .words').textContent === 'caption 9999'")
    tab.wait_for_selector("#cell-9999 img")
    tab.focus("#grid")
    tab.keyboard.press("Home")
    tab.keyboard.press("End")
    open_first(tab)
    assert tab.text_content("#place") == "10,000 of 10,000"
    frames.sort()
    with capsys.disabled():
        print(
            f"\n10,000 images: first paint {paint:.0f} ms, captions after {shown * 1000:.0f} ms; a frame of "
            f"scrolling takes {frames[30]:.0f} ms in the middle, {frames[-1]:.0f} ms at most"
        )


def test_what_the_page_loads_comes_from_its_own_server(serve, folder, open_page):
    running = serve(folder)
    asked = []
    tab = open_page(running)
    tab.on("request", lambda request: asked.append(request.url))
    tab.reload()
    tab.wait_for_selector(".cell img")
    assert len(asked) > 5 and all(url.startswith(running.address) for url in asked)
    static = REPOSITORY / "caption_train/reviewing/static"
    for path in static.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", path.read_text("utf-8")
        ), path
    assert (static / "index.html").read_text("utf-8").count("style=") == 0

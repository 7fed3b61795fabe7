"""Make docs/images again: the report and the review page at the widths of a desk and of a phone.

Trains a small LoRA on the sample set first, for the pages to show something real; two minutes in all. Run it
with the Python of .venv, where Chromium is installed: python scripts/make_screenshots.py
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from make_venv import ROOT, environment
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

OUT = ROOT / "docs/images"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
COUNT, CAPTIONED = 60, 48


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        work = Path(folder)
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        prepare(work)
        draw_report(browser, work / "evaluation/report.html")
        draw_review(browser, work)
        browser.close()


def prepare(work: Path) -> None:
    """Train a LoRA, evaluate it, and have it caption most of a folder of photos."""
    samples, base = ROOT / "examples/shapes", ROOT / "examples/bases/florence2-tiny"
    recipe = ["--learning_rate", "2e-3", "--batch_size", "8", "--epochs", "2", "--validation_split", "0.1"]
    recipe += ["--metrics", "cider", "--eval_every_n_steps", "10", "--save_every_n_epochs", "1"]
    lora, photos = work / "my-style", work / "photos"
    run("train_florence_lora.py", samples / "train", lora, "--model_id", base, *recipe)
    early = next(lora.glob("epoch-0001-*")).rename(work / "my-style-early")
    adapters = ["--peft_model", early, "--peft_model", lora]
    run(
        "evaluate_captions.py",
        samples / "heldout",
        work / "evaluation",
        "--limit",
        "40",
        "--tags",
        "no",
        *adapters,
    )
    photos.mkdir()
    for image in sorted(samples.glob("heldout/*.*g"))[:COUNT]:
        shutil.copy(image, photos)
    flags = ["--peft_model", lora, "--save_captions", "--limit", CAPTIONED]
    run("inference_florence.py", "--images", photos, *flags)


def run(script: str, *arguments: object) -> None:
    """Run a script of the repository, quietly."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments), "--quiet"]
    subprocess.run(command, env=environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"), check=True)


def open_page(browser: Browser, address: str, size: dict[str, int], scheme: str = "light") -> Page:
    """Open a page in a window of a size."""
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    page.goto(address)
    return page


def draw(page: Page, name: str) -> None:
    """Draw what the window shows, when its pictures are there."""
    while page.evaluate("[...document.images].some(image => image.src && !image.complete)"):
        page.wait_for_timeout(20)
    # A picture of text needs few colours, and a repository stays small.
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(OUT / f"{name}.png", optimize=True)


def draw_report(browser: Browser, path: Path) -> None:
    """Draw the page of an evaluation: summary, curves and first images; on a phone, in the dark, images."""
    page = open_page(browser, path.as_uri(), DESK | {"height": 1800})
    page.wait_for_selector("#gallery img[src]")
    draw(page, "report-wide")
    page = open_page(browser, path.as_uri(), PHONE, "dark")
    page.locator("#gallery > li").first.scroll_into_view_if_needed()
    page.evaluate("document.querySelector('#gallery > li').scrollIntoView()")
    page.wait_for_selector("#gallery img[src]")
    draw(page, "report-phone")


def draw_review(browser: Browser, work: Path) -> None:
    """Draw the review page: all images, one image, one image on a phone."""
    flags = ["--peft_model", str(work / "my-style"), "--port", "0"]
    command = [sys.executable, str(ROOT / "review_captions.py"), str(work / "photos"), *flags]
    variables = environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(work / "cache"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True) as server:
        try:
            address = re.search(r"http://\S+", server.stdout.readline())[0]
            page = open_page(browser, address, DESK)
            page.wait_for_selector(".cell img")
            page.focus("#grid")
            mark(page, [*("Home", "a", "ArrowRight", "a", "ArrowRight", "f", "ArrowRight", "a")])
            for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "Shift+ArrowRight"):
                page.keyboard.press(key)
            draw(page, "review-grid")
            for size, name in ((DESK, "review-single"), (PHONE, "review-phone")):
                draw_single(open_page(browser, address, size), name)
        finally:
            server.terminate()


def mark(page: Page, keys: list[str]) -> None:
    """Press keys, and wait for the marks that `a` and `f` make."""
    marks = 0
    for key in keys:
        page.keyboard.press(key)
        marks += key in "af"
        while page.locator(".cell .badges > :not([hidden])").count() < marks:
            page.wait_for_timeout(20)


def draw_single(page: Page, name: str) -> None:
    """Open the third image, ask for a suggestion, and draw what is shown then."""
    page.wait_for_selector(".cell img")
    page.focus("#grid")
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#single:not([hidden]) #picture")
    page.keyboard.press("g")
    page.wait_for_selector("#suggestion:not(:empty)")
    while not page.evaluate("document.getElementById('suggestion').textContent.includes(',')"):
        page.wait_for_timeout(20)
    draw(page, name)


if __name__ == "__main__":
    main()

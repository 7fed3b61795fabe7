"""A folder to review, and the page that shows it."""

from contextlib import ExitStack

import pytest

from tests.fixtures.sample_set import write_image


@pytest.fixture(autouse=True)
def extra():
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="the review page's extra is not installed: pip install '.[review]'")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Four images: one without a caption, two of the same bytes."""
    folder = tmp_path / "photos"
    for name, color, caption in (
        ("a.png", "black", "cat, sofa"),
        ("b.png", "white", "cat, window, morning light"),
        ("c.png", "red", None),
        ("sub/a copy.png", "black", "a black cat"),
    ):
        write_image(folder / name, color, (40, 30))
        if caption:
            (folder / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


@pytest.fixture
def serve(monkeypatch):
    """`serve(folder, …)` runs the page until the test ends."""
    from tests.fixtures.review_page import run_page

    with ExitStack() as stack:
        yield lambda folder, **options: stack.enter_context(run_page(folder, monkeypatch, **options))


@pytest.fixture
def page(serve, folder):
    return serve(folder)

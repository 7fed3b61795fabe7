"""report.html of a run: it grows at each validation, costs no captions, and never ends a run."""

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from caption_train.config.training import TrainOptions
from caption_train.reporting import page as page_module
from caption_train.reporting.page import read_gallery
from caption_train.training.monitor import report as report_module
from caption_train.training.monitor import validation
from caption_train.training.monitor.report import MOST_COLUMNS, Column, RunReport, _thin
from tests.fixtures.runs import assert_same_run, make_options, read_log, train, write_pairs


@pytest.fixture(autouse=True, scope="module")
def short_captions():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(validation, "MAX_NEW_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "images", 8)


@pytest.fixture(scope="module")
def make(data, base):
    def make(output_dir, **changes):
        settings = {"validation_split": 0.5, "metrics": ["cider", "exact_match"], "epochs": 3, **changes}
        return make_options("blip", base, data, output_dir, **settings)

    return make


@pytest.fixture
def options(make, tmp_path):
    return lambda name="lora", **changes: make(tmp_path / name, **changes)


@dataclass
class Watched:
    """A run, how many columns its report had each time that it was written, and how many captions it made."""

    options: TrainOptions
    columns: list[int] = field(default_factory=list)
    captioned: int = 0


@pytest.fixture(scope="module")
def watched(make, tmp_path_factory):
    run = Watched(make(tmp_path_factory.mktemp("watched") / "whole"))
    write, caption = page_module.write_report, validation.caption_items

    def note(path, report):
        write(path, report)
        run.columns.append(len(read_gallery(path)["columns"]))

    def count(trained, family, items, prompts):
        run.captioned += len(items)
        return caption(trained, family, items, prompts)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report_module, "write_report", note)
        patched.setattr(validation, "caption_items", count)
        train("blip", run.options)
    return run


def test_the_report_shows_each_validation(watched):
    chosen = watched.options
    gallery = read_gallery(chosen.output_dir / "report.html")
    assert gallery["columns"] == ["before training", "step 2", "step 4", "step 6"]
    assert len(gallery["items"]) == 4 and all(len(item["answers"]) == 4 for item in gallery["items"])
    assert all(item["picture"][0].startswith("data:image/webp") for item in gallery["items"])
    text = (chosen.output_dir / "report.html").read_text()
    assert "Loss per token" in text and "Learning rate" in text and "Validation metrics" in text
    last = [line for line in read_log(chosen.output_dir) if "eval_cider" in line][-1]
    scores = [item["answers"][3][2]["cider"] for item in gallery["items"]]
    assert sum(scores) / 4 == pytest.approx(last["eval_cider"], abs=1e-3)
    assert f"{last['eval_loss']:.3f}" in text


def test_it_grows_while_the_run_is_at_work(watched):
    assert watched.columns == [1, 2, 3, 4]


def test_it_makes_no_captions_of_its_own(watched, options, monkeypatch):
    assert watched.captioned == 4 * 4
    chosen = options(metrics=[], epochs=1)
    monkeypatch.setattr(validation, "caption_items", lambda *_: pytest.fail("a caption is made"))
    train("blip", chosen)
    page = (chosen.output_dir / "report.html").read_text()
    assert "Loss per token" in page and 'id="gallery"' not in page


def test_previews_are_shown_where_there_are_no_metrics(options):
    chosen = options(metrics=[], sample_every_n_epochs=1)
    train("blip", chosen)
    gallery = read_gallery(chosen.output_dir / "report.html")
    assert gallery["columns"][0] == "before training" and len(gallery["items"]) == 4
    assert all(answer for item in gallery["items"] for answer in item["answers"])


def test_without_validation_images_there_is_none(options):
    chosen = options(validation_split=None, metrics=[], sample_every_n_epochs=1)
    train("blip", chosen)
    assert not (chosen.output_dir / "report.html").exists()
    assert "report.html" not in (chosen.output_dir / "README.md").read_text()


def test_a_report_that_cannot_be_written_changes_nothing_else(watched, options, monkeypatch, capsys):
    good, bad = watched.options, options("bad")

    def fail(path, report):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module, "write_report", fail)
    train("blip", bad)
    assert_same_run(good.output_dir, bad.output_dir)
    assert capsys.readouterr().err.count("report.html is not written: No space left on device") == 1
    assert "report.html" not in (bad.output_dir / "README.md").read_text()


@pytest.mark.parametrize("error", [MemoryError(), ValueError("x"), RecursionError()])
def test_whatever_is_wrong_with_a_report_the_run_goes_on(options, monkeypatch, error):
    def fail(images):
        raise error

    monkeypatch.setattr(report_module, "make_thumbnails", fail)
    assert train("blip", options(epochs=1))["global_step"] == 2


def test_the_card_links_the_report_and_takes_pictures_from_it(watched):
    chosen = watched.options
    card = (chosen.output_dir / "README.md").read_text()
    assert "[report.html](report.html)" in card
    rows = [line for line in card.splitlines() if line.startswith("| ![](samples/")]
    gallery = read_gallery(chosen.output_dir / "report.html")
    assert len(rows) == 4 and (chosen.output_dir / "samples/4.jpg").is_file()
    for row, item in zip(rows, gallery["items"], strict=True):
        assert item["references"][0] in row and item["answers"][-1][0][:20] in row


def test_a_resumed_run_goes_on_with_the_report(watched, options):
    whole, cut = watched.options, options("cut")

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        from caption_train.training.saving import CheckpointSaver

        after = CheckpointSaver.after_step
        patch.setattr(
            CheckpointSaver, "after_step", lambda self, step: (after(self, step), stop(self, step))[0]
        )
        with pytest.raises(KeyboardInterrupt):
            train("blip", cut)
    train("blip", options("cut", resume="auto"))
    one, other = (read_gallery(run.output_dir / "report.html") for run in (whole, cut))
    assert one["columns"] == other["columns"] and len(one["columns"]) == 4
    assert one["items"] == other["items"]
    summary = [
        (run.output_dir / "report.html").read_text().partition('<h2 id="run-')[0] for run in (whole, cut)
    ]
    assert summary[0].replace("whole", "cut") == summary[1]


@pytest.mark.parametrize(
    "data",
    [
        '{"columns":["before training",3,null],"items":[{"name":[],"references":7,"answers":[[1],"x"]},5]}',
        '{"columns":{"a":1},"items":"x"}',
        '{"columns":["before training"],"items":[{"name":"a.png","references":["r"],"answers":'
        '[["t",[9],{"x":"y"}]]}]}',
        "[]",
        "{",
    ],
)
def test_what_anybody_wrote_into_the_page_is_no_error_on_resume(data, tmp_path):
    settings = SimpleNamespace(output_dir=tmp_path, dataset_dir=tmp_path)
    run = SimpleNamespace(
        options=settings,
        plan=SimpleNamespace(first_step=3),
        accelerator=SimpleNamespace(is_main_process=True),
    )
    (tmp_path / "report.html").write_text(f'<script type="application/json" id="data">{data}</script>')
    columns = RunReport(run, [((tmp_path / "a.png", "p"), ["r"])], is_wanted=True)._restore()
    assert all(answer.text == "t" for column in columns.values() for answer in column.answers.values())


def test_a_long_run_keeps_the_first_the_last_and_some_between():
    columns = {step: Column() for step in range(0, 1000, 10)}
    kept = sorted(_thin(columns))
    assert len(kept) == MOST_COLUMNS and (kept[0], kept[-1]) == (0, 990)
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 400

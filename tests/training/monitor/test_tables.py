"""TensorBoard and wandb show the tables and pictures of report.html; read back from what they wrote."""

import html
import io
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from caption_train.reporting.page import read_gallery
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.monitor import validation
from caption_train.training.monitor.tables import (
    COLUMNS,
    LARGEST_SIDE,
    VALIDATION,
    CaptionTables,
    TableRow,
    write_markdown,
    write_wandb_table,
)
from tests.fixtures.forked import start, start_ranks
from tests.fixtures.kills import die_at
from tests.fixtures.runs import make_options, read_log, train, write_pairs
from tests.fixtures.tracker_records import read_wandb_runs

processing = "tensorboard.backend.event_processing"
accumulator = pytest.importorskip(f"{processing}.event_accumulator")
plugins = pytest.importorskip(f"{processing}.plugin_event_accumulator")
pytest.importorskip("wandb")
HOSTILE = "a | b *c* <script>alert(1)</script> `d`\n# e [f](javascript:1) \ud800"


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory):
    """Where wandb keeps what it keeps outside of its run, with the variables that lead there."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "XDG_DATA_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("HOME", str(folder))
        patch.setattr(validation, "MAX_NEW_TOKENS", 6)
        yield folder


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
    """`make("name", …)`: the options of a run with trackers, on eight pictures larger than a table's."""
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "images", 8)
    for path in pairs.glob("*.png"):
        Image.open(path).resize((640, 480)).save(path)

    def make(name, **changes):
        settings = {"validation_split": 0.5, "metrics": ["cider"], "epochs": 3, "log_with": "all"}
        return make_options("blip", base, pairs, tmp_path_factory.mktemp(name) / "out", **settings | changes)

    return make


def run(work, log):
    """Do work in a process of its own, since wandb goes on in the one that started it."""
    code = start(work, log).wait()
    return code, log.read_text()


@pytest.fixture(scope="module")
def resumed(make, tmp_path_factory):
    """The output folder of a run, killed at its fourth step of four, and gone on with from the second."""
    options = make("resumed", epochs=2, save_every_n_steps=2, sample_every_n_steps=3)
    log = tmp_path_factory.mktemp("log") / "log"

    def work():
        die_at("after the gradient", 4)
        train("blip", options)

    code, said = run(work, log)
    assert code == -signal.SIGKILL, said
    code, said = run(lambda: train("blip", replace(options, resume="auto")), log)
    assert code == 0, said
    return options.output_dir


def find_events(output_dir):
    (folder,) = {path.parent for path in (output_dir / "caption-train").glob("events.*")}
    return str(folder)


def read_events(output_dir):
    sizes = {accumulator.SCALARS: 0, accumulator.IMAGES: 0}
    return accumulator.EventAccumulator(find_events(output_dir), sizes).Reload()


def read_texts(output_dir, name):
    """Return what TensorBoard's text page has of a name as (step, Markdown), after it purged old events."""
    events = plugins.EventAccumulator(find_events(output_dir), {plugins.TENSORS: 0}).Reload()
    found = events.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def read_markdown(output_dir, name):
    """Return the tables of a name as (step, rows of cells)."""
    return [
        (step, [split(line) for line in text.splitlines()]) for step, text in read_texts(output_dir, name)
    ]


def split(line):
    return [html.unescape(cell.strip()) for cell in line.split("|")[1:-1]]


def list_rows(output_dir, column):
    """Return the rows that a table shows at a column of the report."""
    gallery = read_gallery(output_dir / "report.html")
    return [
        [item["name"], " / ".join(item["references"]), item["answers"][0][0], item["answers"][column][0]]
        for item in gallery["items"]
    ]


def test_tensorboard_shows_the_tables_of_the_report_once_each(resumed):
    tables = read_markdown(resumed, "captions")
    assert [step for step, _ in tables] == [0, 2, 4]
    for (_, rows), column in zip(tables, (0, 1, 3), strict=True):
        assert rows[0] == ["", *COLUMNS]
        # Step 3, a preview's, is a column of the report too.
        assert [row[1:] for row in rows[2:]] == list_rows(resumed, column)
        assert [row[0] for row in rows[2:]] == ["0", "1", "2", "3"]


def test_tensorboard_shows_pictures_made_small_once_for_each_start(resumed):
    events = read_events(resumed)
    for number in range(4):
        found = events.Images(f"captions/{number}")
        assert [image.step for image in found] == [0, 4]
        assert Image.open(io.BytesIO(found[0].encoded_image_string)).size == (LARGEST_SIDE, 192)


def test_each_step_is_there_once_and_the_settings_too(resumed):
    events = read_events(resumed)
    logged = [(line["step"], pytest.approx(line["loss"])) for line in read_log(resumed) if "loss" in line]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == logged
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert len([*(resumed / "caption-train").rglob("hparams.yml")]) == 1
    run_id = Progress.read(resumed / "last" / "state").run_id
    names = [path.name for path in (resumed / "wandb").glob("offline-run-*/*.wandb")]
    assert names == [f"run-{run_id}.wandb"] * 2


def test_metrics_have_the_names_and_values_of_the_log(resumed):
    lines = [line for line in read_log(resumed) if "eval_cider" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    events = read_events(resumed)
    latest = read_wandb_runs(resumed / "wandb")[-1].history
    assert [line["_step"] for line in latest] == [3, 4]
    for name in ("eval_loss", "eval_cider"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
        assert latest[-1][name] == expected[-1][1]


def test_wandb_goes_on_with_its_tables_after_a_kill(resumed):
    first, second = read_wandb_runs(resumed / "wandb")
    # Of what was logged right before a kill, wandb may not have written everything.
    assert set(first.read_tables("captions")) <= {0, 2} and list(second.read_tables("captions")) == [4]
    assert set(first.read_tables("samples")) <= {0, 3} and list(second.read_tables("samples")) == [3]
    assert_same_tables(second, "captions", {4: 3}, resumed)
    assert_same_tables(second, "samples", {3: 2}, resumed)


def assert_same_tables(wandb_run, name, columns, output_dir):
    """Hold wandb's tables to columns of the report: {step: column}."""
    tables = wandb_run.read_tables(name)
    for step, column in columns.items():
        assert tables[step].columns == ["image", *COLUMNS]
        assert [row[1:] for row in tables[step].data] == list_rows(output_dir, column)
        for picture, *_ in tables[step].data:
            path = tables[step].files[picture["path"]]
            assert path.resolve().is_relative_to(output_dir)
            with Image.open(path) as image:
                assert image.size == (LARGEST_SIDE, 192) and image.format == "JPEG"


def test_previews_have_a_table_with_the_caption_of_before_training_after_a_resume_too(resumed):
    tables = read_markdown(resumed, "samples")
    assert [step for step, _ in tables] == [0, 3]
    assert [row[1:] for row in tables[1][1][2:]] == list_rows(resumed, 2)


def test_no_picture_and_no_table_is_left_outside_of_the_output_folder(resumed, home):
    kept = [path for path in home.rglob("*wandb*/**/*") if path.is_file() and path.suffix != ".log"]
    assert kept == []
    staged = [*(resumed / "wandb").glob("offline-run-*/artifacts/staging/*")]
    assert staged and all(path.is_file() for path in staged)


def test_of_several_ranks_one_writes(make, tmp_path):
    options = make("ranks", epochs=1)
    ranks = start_ranks(2, lambda: train("blip", options), tmp_path / "log")
    assert [rank.wait() for rank in ranks] == [0, 0], (tmp_path / "log").read_text()
    tables = read_markdown(options.output_dir, "captions")
    assert [step for step, _ in tables] == [0, 1]
    assert [row[1:] for row in tables[1][1][2:]] == list_rows(options.output_dir, 1)
    (run_,) = read_wandb_runs(options.output_dir / "wandb")
    assert sorted(run_.read_tables("captions")) == [0, 1]
    assert_same_tables(run_, "captions", {0: 0, 1: 1}, options.output_dir)


@pytest.mark.parametrize("stays", [True, False])
def test_log_no_images_keeps_pictures_here(tmp_path, stays):
    pictures = []
    writer = SimpleNamespace(
        add_text=lambda *_: None, add_image=lambda name, *_, **__: pictures.append(name), flush=lambda: None
    )
    tracker = SimpleNamespace(name="tensorboard", writer=writer)
    run = SimpleNamespace(
        options=SimpleNamespace(log_no_images=stays),
        accelerator=SimpleNamespace(is_main_process=True, trackers=[tracker]),
    )
    path = sorted(write_pairs(tmp_path, 1).glob("*.png"))[0]
    keys = [(path, "prompt"), (tmp_path / "gone.png", "prompt")]
    tables = CaptionTables(run, SimpleNamespace(find_captions=lambda step: {}))
    tables.write(VALIDATION, 0, dict.fromkeys(keys, "now"), {key: ["reference"] for key in keys})
    assert pictures == ([] if stays else ["captions/0"])


def test_what_a_caption_says_is_text_in_every_tracker(tmp_path):
    from tensorboard.plugin_util import markdown_to_safe_html
    from torch.utils.tensorboard import SummaryWriter

    row = TableRow(None, "x\ud800|y.png", HOSTILE, "", HOSTILE)
    with SummaryWriter(tmp_path / "out" / "caption-train") as writer:
        write_markdown(writer, "captions", 0, [row], with_pictures=True)
    ((_, rows),) = read_markdown(tmp_path / "out", "captions")
    assert len(rows) == 3 and len(rows[2]) == 5
    ((_, text),) = read_texts(tmp_path / "out", "captions")
    page = markdown_to_safe_html(text)
    assert page.count("<td") == 5 and not any(
        tag in page for tag in ("<script", "<em", "<a ", "<code", "<h1")
    )

    def work():
        import wandb

        with wandb.init(project="p", dir=str(tmp_path)) as started:
            write_wandb_table(started, "captions", 0, [row])

    code, said = run(work, tmp_path / "log")
    assert code == 0, said
    (run_,) = read_wandb_runs(Path(tmp_path / "wandb"))
    assert run_.read_tables("captions")[0].data == [row.texts]

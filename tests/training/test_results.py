"""What a finished run leaves beside its weights: results in the card, samples, an upload to the hub."""

import json

import huggingface_hub
import pytest
from PIL import Image

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.training.monitor.curve import CURVE_FILE, draw_curve
from caption_train.training.results import check_hub, list_files, push
from tests.fixtures.runs import make_options, read_log, train, write_pairs


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    """The folder of a run with validation, metrics and previews, and its summary."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_pairs(folder / "images", 10)
    (data / "00.txt").write_text("a | b <script>")
    settings = {"validation_split": 0.4, "metrics": ["exact_match"], "sample_every_n_epochs": 1}
    options = make_options("blip", tiny_base("blip"), data, folder / "lora", **settings)
    return folder / "lora", train("blip", options)


def test_the_base_is_measured_before_the_first_step(finished):
    folder, summary = finished
    first = read_log(folder)[0]
    assert (first["step"], first["epoch"]) == (0, 0)
    assert summary["base_loss"] == first["eval_loss"] > summary["validation_loss"]
    assert summary["best_step"] != 0
    assert summary["base_exact_match"] == first["eval_exact_match"]


def test_the_card_holds_results_and_samples_with_their_pictures(finished):
    folder, summary = finished
    card = (folder / "README.md").read_text()
    assert f"| loss | {summary['base_loss']:.4f} | {summary['validation_loss']:.4f} |" in card
    assert "| exact_match | " in card
    rows = [line for line in card.splitlines() if line.startswith("| ![](")]
    assert len(rows) == 4 and all(row.count("|") == 5 for row in rows)
    assert "<script>" not in card
    for number in range(1, 5):
        with Image.open(folder / f"samples/{number}.jpg") as picture:
            assert max(picture.size) <= 512
    assert json.loads((folder / "training.json").read_text())["global_step"] == summary["global_step"]


def test_the_curve_shows_the_best_checkpoint_and_the_metrics(finished, monkeypatch):
    from matplotlib.figure import Figure

    folder, summary = finished
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    draw_curve(folder, summary["best_step"], "exact_match")
    losses, metrics, _ = drawn[0].axes
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert f"best by exact_match: step {summary['best_step']}" in labels and "validation" in labels
    assert [text.get_text() for text in metrics.get_legend().get_texts()] == ["exact_match"]
    assert (folder / CURVE_FILE).exists()


def test_without_previews_and_validation_the_card_stays_as_it_was(tiny_base, tmp_path):
    options = make_options("blip", tiny_base("blip"), write_pairs(tmp_path / "images", 2), tmp_path / "lora")
    train("blip", options)
    card = (tmp_path / "lora/README.md").read_text()
    assert "## " not in card and not (tmp_path / "lora/samples").exists()
    assert card == (tmp_path / "lora/last/README.md").read_text()


def test_an_upload_takes_the_model_and_no_checkpoint(finished):
    files = list_files(finished[0])
    assert {"README.md", "adapter_model.safetensors", "samples/1.jpg", CURVE_FILE} <= {*files}
    assert (finished[0] / "report.html").exists() and "report.html" not in files, "many images are in it"
    assert not [name for name in files if "state" in name or name.startswith(("epoch", "log", "last", "."))]


def test_offline_an_upload_is_a_dry_run(finished, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_hub("me/lora")
    push(finished[0], "me/lora")
    said = capsys.readouterr().err
    assert "nothing is uploaded" in said and "adapter_model.safetensors" in said


class Hub:
    """Stands for huggingface_hub.HfApi, and fails if it is told to."""

    calls: list = []
    error: Exception | None = None

    def create_repo(self, repository, **settings):
        self.calls.append((repository, settings))
        if self.error:
            raise self.error

    def upload_folder(self, **settings):
        self.calls.append(settings)


def test_an_upload_is_private_and_its_failure_is_one_line(finished, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    push(finished[0], "me/lora")
    (repository, settings), upload = Hub.calls
    assert repository == "me/lora" and settings == {"private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/lora" and upload["allow_patterns"] == list_files(finished[0])
    assert "huggingface.co/me/lora" in capsys.readouterr().err
    monkeypatch.setattr(Hub, "error", OSError("no route\nto host"))
    with pytest.raises(CaptionTrainError, match=r"--push_to_hub me/lora: no route; .* with: hf upload"):
        push(finished[0], "me/lora")


def test_a_bad_name_or_no_login_is_refused_before_the_run(monkeypatch):
    with pytest.raises(UsageError, match="--push_to_hub a/b/c: "):
        check_hub("a/b/c")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="no login; run `hf auth login`, or set HF_TOKEN"):
        check_hub("me/lora")
    check_hub(None)

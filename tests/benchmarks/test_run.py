"""The speed benchmark does what it says on the tiny bases. How long anything takes is no verdict here."""

import json
import os
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, Florence2ForConditionalGeneration

from benchmarks import draft_decode, run
from benchmarks.speed import limit, rows, worker
from benchmarks.speed.bases import make_adapter, make_base
from benchmarks.speed.captioning_sides import make_pipeline
from benchmarks.speed.photos import SIZES, write_photos
from benchmarks.speed.report import HEADING, describe_machine, find_falls, put_section, render
from benchmarks.speed.rows import (
    Effort,
    compare,
    make_captioning_row,
    make_frozen_row,
    make_training_row,
    measure_row,
)
from benchmarks.speed.sides import Side
from tests.fixtures.forked import start

ONCE = Effort(0, least=1, most=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


class ForkedSide(Side):
    """A side in a fork of this process, which has imported already what a new one would import."""

    def __init__(self, spec, log):
        (read_commands, write_commands), (read_answers, write_answers) = os.pipe(), os.pipe()

        def work():
            # Else this process would not see that the other one is gone.
            os.close(write_commands)
            os.dup2(read_commands, 0)
            os.dup2(write_answers, 1)
            sys.stdin, sys.argv = os.fdopen(0), ["worker", json.dumps(spec)]
            worker.main()

        log.touch()
        child = start(work, log)
        os.close(read_commands)
        os.close(write_answers)
        ends = {"stdin": os.fdopen(write_commands, "w"), "stdout": os.fdopen(read_answers)}
        # Waited for once, when it is closed.
        calls = {"wait": int, "kill": child.kill, "communicate": child.wait}
        self.process = SimpleNamespace(**ends, **calls, stderr=log.open())


@pytest.fixture
def forked(monkeypatch, tmp_path):
    logs = (tmp_path / f"side-{number}" for number in count())
    monkeypatch.setitem(limit.PRODUCT, "cpu", 128)
    monkeypatch.setattr(rows, "Side", lambda spec: ForkedSide(spec, next(logs)))


def test_a_side_whose_process_fails_says_its_last_line():
    side = Side({"row": "no such row"})
    with pytest.raises(RuntimeError, match="no such row"):
        side.answer()
    side.close()


def test_the_sides_of_training_take_the_same_steps(folder, forked):
    row = replace(make_training_row("blip-tiny", 2, "no", photos=4), sides=("ours", "Trainer"))
    found = measure_row(row, folder, "cpu", ONCE)
    assert found["sides"]["Trainer"]["largest_loss_difference"] < 1e-5
    assert found["flops"] > 1e7 and found["peak_flops_per_second"] > 1e8
    assert found["rounds"] == 1 and set(found["ratios"]) == {"Trainer"}
    assert all(side["peak_bytes"] > 1e8 and side["cpu_seconds"] > 0 for side in found["sides"].values())


def test_kept_features_give_the_losses_of_computed_ones(folder, forked):
    found = measure_row(make_frozen_row("blip-tiny", 1, "no"), folder, "cpu", ONCE)
    assert found["sides"]["features computed"]["largest_loss_difference"] < 1e-5


def test_the_sides_of_captioning_make_the_same_tokens_and_one_that_fails_is_named(folder, forked):
    row = make_captioning_row("florence-tiny", 2)
    row = replace(row, sides=("ours", "one at a time", "no such side"))
    found = measure_row(row, folder, "cpu", ONCE)
    assert found["sides"]["one at a time"]["images_with_other_tokens"] == 0
    assert "no such side" in found["sides"]["no such side"]["error"]
    assert "does not run" in render({"cpu": {"machine": describe_machine("cpu", "run.py"), row.name: found}})


@pytest.mark.parametrize("family", ["blip", "florence"])
def test_the_pipeline_captions_in_batches_of_the_size_that_ours_has(folder, family, monkeypatch):
    base, rows = make_base(f"{family}-tiny", folder), []
    spec = {"family": family, "base": str(base), "batch_size": 2, "tokens": 4}
    spec["adapter"] = str(make_adapter(family, base, folder / f"{family}-tiny-adapter"))
    caption = make_pipeline(spec, torch.device("cpu"), torch.float32)
    for model_class in (BlipForConditionalGeneration, Florence2ForConditionalGeneration):
        generate = model_class.generate

        def note(model, *, pixel_values, generate=generate, **settings):
            rows.append(len(pixel_values))
            return generate(model, pixel_values=pixel_values, **settings)

        monkeypatch.setattr(model_class, "generate", note)
    tokens = caption(sorted(write_photos(folder, 3).glob("*.jpg")))
    assert rows == [2, 1] and [len(ids) for ids in tokens] == [4] * 3


def test_other_tokens_and_losses_are_reported():
    rounds = [{"ours": {"tokens": [[1, 2], [3, 4]]}, "pipeline": {"tokens": [[9, 1, 2], [9, 3, 5]]}}]
    assert compare(rounds, "pipeline") == {"images_with_other_tokens": 1}
    rounds = [
        {"ours": {"loss": 2.0}, "Trainer": {"loss": 2.5}},
        {"ours": {"loss": 1.0}, "Trainer": {"loss": 1}},
    ]
    assert compare(rounds, "Trainer") == {"largest_loss_difference": 0.5}


def test_photos_have_their_size_and_are_made_once(folder):
    made = write_photos(folder, 2)
    pictures = sorted(made.glob("*.jpg"))
    assert [Image.open(path).size for path in pictures] == [SIZES[1]] * 2
    assert len(pictures[0].with_suffix(".txt").read_text().split()) == 20
    before = pictures[0].stat().st_mtime_ns
    assert write_photos(folder, 2) == made and pictures[0].stat().st_mtime_ns == before


COMMITTED = {"a": {"ratios": {"Trainer": 2.0, "loop": 1.0}}, "gone": {"ratios": {"Trainer": 1.0}}}


def test_a_fall_of_more_than_a_fifth_is_a_line():
    rows = {"a": {"ratios": {"Trainer": 1.55, "loop": 0.81}}, "new": {"ratios": {"Trainer": 0.1}}}
    assert find_falls(COMMITTED, rows) == ["a: against Trainer 1.55 ×, 2.00 × before (-22%)"]
    assert find_falls(COMMITTED, {"a": {"error": "killed"}}) == [
        "a: against Trainer 2.00 × before, now none: killed",
        "a: against loop 1.00 × before, now none: killed",
    ]


@pytest.mark.parametrize(("ratio", "code"), [(2.0, 0), (0.5, 1)])
def test_check_writes_nothing_and_fails_on_a_fall(ratio, code, tmp_path, monkeypatch, capsys):
    results = tmp_path / "speed.json"
    results.write_text(json.dumps({"cpu, quick": {"a": {"ratios": {"Trainer": 1.0}}}}))
    before = results.read_text()
    work = {"a": lambda: {"a": {"ratios": {"Trainer": ratio}}}}
    monkeypatch.setattr(run, "list_work", lambda *_: work)
    flags = ["--quick", "--check", "--results", str(results), "--folder", str(tmp_path / "models")]
    assert run.main(flags) == code
    assert ("a: against Trainer 0.50" in capsys.readouterr().out) == bool(code)
    assert results.read_text() == before


def test_a_row_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no memory")

    results = tmp_path / "speed.json"
    monkeypatch.setattr(run, "list_work", lambda *_: {"bad": fail, "good": lambda: {"good": {"ratios": {}}}})
    assert run.main(["--results", str(results), "--folder", str(tmp_path / "models")]) == 1
    rows = json.loads(results.read_text())["cpu"]
    assert rows["bad"] == {"error": "no memory"} and rows["good"] == {"ratios": {}} and rows["machine"]["cpu"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "tpu"], "--device"),
        (["--only", "nothing"], "--only nothing: names none of"),
        (["--check", "--results", "absent.json"], "--check: absent.json has no rows of cpu"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run.main(flags)
    assert said in str(stopped.value) and "\n" not in str(stopped.value)
    assert str(stopped.value).startswith("run.py: ")


def test_the_section_is_replaced_and_others_stay():
    old = f"# Results\n\n{HEADING}\n\nold\n\n### cpu\n\nold\n\n## Memory\n\nkept\n"
    assert put_section(old, f"{HEADING}\n\nnew\n") == f"# Results\n\n{HEADING}\n\nnew\n\n## Memory\n\nkept\n"
    assert put_section("# Results\n", f"{HEADING}\n\nnew\n") == f"# Results\n\n{HEADING}\n\nnew\n"


def test_what_draft_decoding_saves_and_changes_is_a_line(tmp_path, tiny_base, capsys):
    for number in range(2):
        Image.effect_noise((1600, 1200), 60).convert("RGB").save(tmp_path / f"{number}.jpg")
    flags = ["--model_id", str(tiny_base("blip")), "--images", str(tmp_path), "--captions"]
    assert draft_decode.main(flags) == 0
    line = capsys.readouterr().out
    assert line.startswith("2 photos: ") and "levels at most" in line and "captions of 2 change" in line

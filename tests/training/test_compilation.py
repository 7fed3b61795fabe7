"""`--compile`: the same losses from compiled blocks, steps that are counted, and failures in one line."""

from functools import partial

import pytest
import torch

from caption_train.errors import CaptionTrainError
from caption_train.families import get_family
from caption_train.training import compilation
from caption_train.training.compilation import MOST_STEPS, PLAIN_STEPS, QUIET_STEPS, Compilation
from caption_train.training.memory import gradient_checkpointing
from caption_train.training.memory.gradient_checkpointing import find_blocks
from tests.fixtures.runs import make_options, prepare_run, read_log, save_base, write_pairs


@pytest.fixture
def traced(monkeypatch):
    """What torch.compile traces, run as it is: the C++ compiler would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch):
    """Takes a step of a compilation, whose graphs the test counts; and what was said."""
    graphs, said = [0], []
    monkeypatch.setattr(compilation, "count_graphs", lambda: graphs[0])

    def step(made: Compilation, seconds: float, compiles: bool = False) -> None:
        graphs[0] += compiles
        made.after_step(seconds)

    return step, said


def make_blocks() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))


def run(tmp_path, name: str, **changes) -> list[float]:
    base = save_base("blip", tmp_path / "base")
    pairs = tmp_path / "pairs"
    if not pairs.exists():
        write_pairs(pairs, 12)
    options = make_options("blip", base, pairs, tmp_path / name, epochs=1, batch_size=1, **changes)
    prepare_run(options, get_family("blip")).train()
    return [row["loss"] for row in read_log(tmp_path / name) if "loss" in row]


def test_compiled_blocks_train_to_the_losses_of_plain_ones(tmp_path, traced, capsys):
    plain = run(tmp_path, "plain", dropout=0.0)
    before = compilation.count_graphs()
    compiled = run(tmp_path, "compiled", dropout=0.0, compile=True, gradient_checkpointing=True)
    assert compilation.count_graphs() > before
    assert compiled[:PLAIN_STEPS] == plain[:PLAIN_STEPS]
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert "--compile: " in capsys.readouterr().err


def test_only_training_steps_run_compiled_code(traced):
    model = make_blocks()
    (block,) = find_blocks(model)
    made = Compilation(model, PLAIN_STEPS, print)
    before = compilation.count_graphs()
    block.eval()(torch.ones(1, 2))
    with torch.no_grad():
        block.train()(torch.ones(1, 2))
    assert compilation.count_graphs() == before
    block(torch.ones(1, 2)).sum().backward()
    assert compilation.count_graphs() == before + 1
    made.stop()
    block(torch.ones(1, 2, 2)).sum().backward()
    assert compilation.count_graphs() == before + 1


def test_the_line_counts_the_time_to_compile_and_the_steps_that_pay_for_it(counted):
    step, said = counted
    made = Compilation(make_blocks(), 0, said.append)
    for seconds in (9.0, *[2.0] * (PLAIN_STEPS - 1)):
        step(made, seconds)
    for compiles in (True, False, True):
        step(made, 21.0, compiles)
    for _ in range(QUIET_STEPS):
        assert not said
        step(made, 1.0)
    assert said == [
        "--compile: 60 s to compile; a step takes 1.00 s, without it 2.00 s: it has paid after 60 steps"
    ]
    step(made, 1.0, True)
    assert len(said) == 1


def test_a_step_that_is_no_faster_is_said(counted):
    step, said = counted
    made = Compilation(make_blocks(), 0, said.append)
    for _ in range(PLAIN_STEPS + 1 + QUIET_STEPS):
        step(made, 2.0, compiles=len(made.plain) == PLAIN_STEPS and not made.warm_up)
    assert said[0].endswith("it does not pay here, leave it out")


def test_nothing_to_compile_is_said(counted):
    step, said = counted
    model = make_blocks()
    for block in find_blocks(model):
        block.forward = partial(gradient_checkpointing._recompute, block, block.forward)
    made = Compilation(model, 0, said.append)
    for _ in range(PLAIN_STEPS + QUIET_STEPS):
        step(made, 1.0)
    assert said == ["--compile: finds no blocks that it can compile: does nothing here"]


def test_a_resumed_run_is_compiled_from_its_first_step(counted):
    step, said = counted
    made = Compilation(make_blocks(), PLAIN_STEPS, said.append)
    step(made, 30.0, True)
    for _ in range(QUIET_STEPS):
        step(made, 1.0)
    assert said == ["--compile: compiled in 30 s; a step takes 1.00 s"]


def test_a_compiler_that_finds_no_end_is_stopped(counted):
    step, said = counted
    made = Compilation(make_blocks(), 0, said.append)
    for number in range(PLAIN_STEPS + MOST_STEPS):
        step(made, 1.0, compiles=number % 3 == 0)
    assert not made.is_on
    assert "shapes of batches change" in said[0]


def test_a_failure_of_the_compiler_is_one_line_that_names_the_flag(traced, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=fail))
    model = make_blocks().train()
    (block,) = find_blocks(model)
    made = Compilation(model, PLAIN_STEPS, print)
    with pytest.raises(CaptionTrainError) as caught, made.explaining():
        block(torch.ones(1, 2))
    assert str(caught.value).startswith("--compile: torch.compile failed: no compiler; install")
    assert "\n" not in str(caught.value)

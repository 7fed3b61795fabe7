"""The loop of training.py on a small network: what each optimizer and accelerator does to it."""

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from caption_train.errors import UsageError
from caption_train.training.distributed.accelerator import accumulate, make_accelerator
from caption_train.training.optim.optimizer import make_lr_scheduler, make_optimizer
from tests.fixtures.network import Run, make_network, make_options, make_updates

FLORA = {"optimizer_name": "Flora", "accumulation_compression": True}
EXACT = {"optimizer_rank": 1000, "accumulation_rank": 1000}


def assert_equal(first: dict, second: dict) -> None:
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys() and not different


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_rank_above_every_dimension_equals_no_compression(max_grad_norm):
    updates = make_updates(6, micro=3)
    exact = Run(make_options(**FLORA, **EXACT, max_grad_norm=max_grad_norm))
    plain = Run(make_options(optimizer_name="Flora", optimizer_rank=1000, max_grad_norm=max_grad_norm))
    assert exact.train(updates) == plain.train(updates)
    assert_equal(exact.weights(), plain.weights())


def test_no_full_gradient_is_alive_after_backward():
    run = Run(make_options(**FLORA, accumulation_rank=4))
    for batch in make_updates(1)[0]:
        with accumulate(run.accelerator, run.model, last=False):
            run.accelerator.backward(run.model(*batch))
        assert all(p.grad is None for p in run.model.parameters())
    shapes = {name: tuple(run.accelerator.packs[p].shape) for name, p in run.model.named_parameters()}
    assert shapes["embed.weight"] == (40, 4) and shapes["lora_A.weight"] == (4, 32)
    assert shapes["norm.weight"] == (24,)


@pytest.mark.parametrize("scheduler", ["OneCycle", "constant", "linear", "cosine"])
def test_the_schedule_reaches_the_compressed_step(scheduler):
    run = Run(make_options(**FLORA, accumulation_rank=4, scheduler=scheduler, warmup_steps=5, weight_decay=0))
    moved = []
    for batches in make_updates(8):
        before = run.weights()["tall.weight"]
        rate = run.optimizer.param_groups[0]["lr"]
        run.step(batches)
        moved.append((rate, (run.weights()["tall.weight"] - before).abs().mean().item()))
    for rate, distance in moved:
        assert distance <= 1.5 * rate and distance >= 0.05 * rate


@pytest.mark.parametrize("changes", [FLORA, {"optimizer_name": "Flora"}, {}, {"optimizer_name": "AdamW8bit"}])
def test_a_step_with_a_nan_gradient_changes_nothing(changes):
    run = Run(make_options(**changes))
    updates = make_updates(3)
    run.step(updates[0])
    before = run.weights()
    ids, target = updates[1][0]
    _, norm = run.step([updates[1][1], (ids, target * math.nan)])
    assert not math.isfinite(norm)
    assert_equal(before, run.weights())
    loss, norm = run.step(updates[2])
    assert math.isfinite(loss) and math.isfinite(norm)


def test_clipping_limits_the_norm_of_the_decompressed_gradient():
    run = Run(make_options(**FLORA, accumulation_rank=4))
    for batch in make_updates(1)[0]:
        run.accelerator.backward(run.model(*batch))
    parameters = list(run.model.parameters())
    before = run.accelerator.clip_grad_norm_(parameters, 0.01)
    after = run.accelerator.clip_grad_norm_(parameters, math.inf)
    assert before > 0.1 and after.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("changes", [FLORA, {"optimizer_name": "Flora"}, {}, {"optimizer_name": "AdamW8bit"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(changes, dtype, tmp_path):
    options = make_options(**{"optimizer_rank": 4, "accumulation_rank": 4, **changes})
    updates = [[(ids, target.to(dtype)) for ids, target in batches] for batches in make_updates(6)]
    whole = Run(options, make_network().to(dtype))
    whole.train(updates[:3])
    torch.save(
        [whole.optimizer.state_dict(), whole.lr_scheduler.state_dict(), whole.model.state_dict()],
        tmp_path / "state.pt",
    )
    expected = whole.train(updates[3:])
    optimizer, schedule, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    model = make_network().to(dtype)
    model.load_state_dict(weights)
    resumed = Run(options, model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.lr_scheduler.load_state_dict(schedule)
    assert resumed.train(updates[3:]) == expected
    assert_equal(resumed.weights(), whole.weights())


def test_packs_saved_in_the_middle_of_an_accumulation_resume():
    options = make_options(**FLORA, accumulation_rank=4)
    first, second = make_updates(1)[0]
    run = Run(options)
    with accumulate(run.accelerator, run.model, last=False):
        run.accelerator.backward(run.model(*first))
    saved = copy.deepcopy(run.optimizer.state_dict())
    resumed = Run(options)
    resumed.optimizer.load_state_dict(saved)
    assert resumed.step([second]) == run.step([second])
    assert_equal(resumed.weights(), run.weights())


def test_flora_at_upstreams_ranks_takes_upstreams_steps():
    from flora_opt.optimizers.torch.flora import Flora as Upstream

    weights = [torch.randn(24, 16), torch.randn(16, 32), torch.randn(32)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterList(ours)
    optimizers = [
        make_optimizer(make_options(optimizer_name="Flora", optimizer_rank=4), model),
        Upstream(theirs, lr=1e-2, rank=4, beta1=0.9, weight_decay=1e-4, scale_parameter=False),
    ]
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 10])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("scheduler", ["OneCycle", "constant", "linear", "cosine"])
def test_every_schedule_lasts_its_steps_and_never_passes_the_peak(scheduler, total_steps, warmup_steps):
    options = make_options(scheduler=scheduler, warmup_steps=warmup_steps)
    optimizer = make_optimizer(options, torch.nn.Linear(2, 2))
    lr_scheduler = make_lr_scheduler(options, optimizer, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    assert all(0 <= rate <= 1e-2 * (1 + 1e-9) for rate in rates)
    if 0 < warmup_steps < total_steps:
        assert rates[warmup_steps] == pytest.approx(1e-2)


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(UsageError, match="--device nonsense"):
        make_accelerator(make_options(device="nonsense"))


def test_what_accelerate_resolved_is_checked_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UsageError, match="--mixed_precision fp16 does not work on --device cpu"):
        make_accelerator(make_options(device=None if not torch.cuda.is_available() else "cpu"))


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage: set it to 2, or use examples"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "deepspeed_config_file: is not read"),
        (DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "use --max_grad_norm"),
        (DEEPSPEED, "num_processes: one has nothing to share out"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for MEGATRON_LM"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "true"}, "fsdp_version: set it to 2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8, which is not supported"),
    ],
)
def test_what_the_launcher_asks_for_is_refused_in_one_line(variables, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        make_accelerator(make_options())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "cannot be imported"),
        # Its norm of a gradient that is not finite is 1.0, and the weights would be none either.
        (SimpleNamespace(__version__="0.19.7+cu130"), r"is of version 0\.19\.7\+cu130"),
    ],
)
def test_a_launch_with_deepspeed_says_how_to_install_it(module, words, monkeypatch):
    for name, value in (DEEPSPEED | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    with pytest.raises(UsageError, match=rf"DeepSpeed, which {words}.*pip install 'deepspeed>=.*fsdp\.yaml"):
        make_accelerator(make_options())


def test_deepspeed_that_fails_on_import_in_its_own_way_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text(
        "import os; raise Exception(os.environ['DS_ACCELERATOR'], 'no CUDA')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in (DEEPSPEED | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    # On a machine with GPUs, too, it must work where the run does.
    with pytest.raises(UsageError, match=r"cannot be imported \(\('cpu', 'no CUDA'\)\)"):
        make_accelerator(make_options(device="cpu"))


def test_backward_never_divides(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(make_options(gradient_accumulation_steps=4))
    weight = torch.ones((), requires_grad=True)
    accelerator.backward(weight * 3)
    assert weight.grad == 3


@pytest.mark.parametrize("optimizer_name", ["AdamW", "AdamW8bit", "Flora"])
def test_lora_plus_steps_lora_b_that_much_faster(optimizer_name):
    options = make_options(optimizer_name=optimizer_name, lora_plus_ratio=16, scheduler="constant")
    run = Run(options)
    rates = {p: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[p] for name, p in run.model.named_parameters()}
    assert by_name.pop("lora_B.weight") == pytest.approx(16e-2)
    assert set(by_name.values()) == {1e-2} and len(rates) == len(list(run.model.parameters()))
    run.train(make_updates(1))


def test_a_frozen_parameter_is_in_no_optimizer():
    model = make_network()
    model.embed.weight.requires_grad_(False)
    optimizer = make_optimizer(make_options(), model)
    assert all(p is not model.embed.weight for group in optimizer.param_groups for p in group["params"])


def test_the_8bit_state_is_a_quarter():
    model = torch.nn.Linear(128, 128, bias=False)
    states = []
    for name in ("AdamW", "AdamW8bit"):
        optimizer = make_optimizer(make_options(optimizer_name=name), model)
        model.weight.grad = torch.randn(128, 128)
        optimizer.step()
        tensors = [v for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor)]
        moments = [t for t in tensors if t.shape == (128, 128)]
        assert len(moments) == 2
        states.append(sum(t.nbytes for t in moments))
    assert states[1] == states[0] / 4

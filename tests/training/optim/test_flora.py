"""The compression against the paper's formulas, and several processes against one."""

import math

import pytest
import torch
from flora_opt.optimizers.torch import flora as upstream
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_train.training.distributed.accelerator import make_accelerator
from caption_train.training.optim.flora import CompressedAccelerator, Flora
from tests.fixtures.forked import start_ranks
from tests.fixtures.network import Run, make_network, make_options, make_updates
from tests.fixtures.train_on_ranks import SETUPS, train_on_rank

RANKS = 2


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = start_ranks(RANKS, lambda: train_on_rank(folder), folder / "log")
    assert [rank.wait() for rank in ranks] == [0] * RANKS, (folder / "log").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", SETUPS)
def test_ranks_do_not_diverge(on_ranks, name):
    first, second = (results[name]["weights"] for results in on_ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SETUPS)
def test_two_processes_equal_one_with_the_same_global_batch(on_ranks, name):
    run = Run(make_options(**SETUPS[name]))
    history = run.train(make_updates(5, micro=3))
    losses = [[loss for loss, _ in results[name]["history"]] for results in on_ranks]
    assert [loss for loss, _ in history] == pytest.approx(
        [sum(parts) / RANKS for parts in zip(*losses, strict=True)], abs=1e-5
    )
    assert [norm for _, norm in history] == pytest.approx(
        [norm for _, norm in on_ranks[0][name]["history"]], rel=1e-4
    )
    for key, value in run.weights().items():
        torch.testing.assert_close(value, on_ranks[0][name]["weights"][key], rtol=0, atol=1e-4)


def test_only_packs_cross_between_processes(on_ranks):
    network = make_network()
    full = sum(p.numel() * p.element_size() for p in network.parameters())
    packs = sum(4 * math.prod(_pack_shape(p, 4)) for p in network.parameters())
    flags = len(list(network.parameters()))
    assert on_ranks[0]["compressed"]["bytes"] == packs + flags < full / 2
    assert on_ranks[0]["exact"]["bytes"] == full + flags


def make_compressor(rank: int, *parameters: torch.nn.Parameter) -> CompressedAccelerator:
    options = make_options(optimizer_name="Flora", accumulation_compression=True, accumulation_rank=rank)
    accelerator = make_accelerator(options)
    accelerator.prepare_optimizer(Flora(parameters, lr=0.0))
    return accelerator


def send_back(p: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    (p * gradient).sum().backward()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_a_pack_is_linear_and_never_larger_than_its_gradient(shape, rank, micro_batches):
    p = torch.nn.Parameter(torch.zeros(shape))
    accelerator = make_compressor(rank, p)
    gradients = torch.randn(micro_batches, *shape)
    for gradient in gradients:
        send_back(p, gradient)
    accumulated = accelerator.decompress(p)
    assert accelerator.packs[p].numel() <= p.numel() and accumulated.shape == p.shape
    accelerator.clear_packs()
    send_back(p, gradients.sum(0))
    torch.testing.assert_close(accelerator.decompress(p), accumulated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_the_projection_is_normal_with_variance_one_over_rank(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    accelerator = make_compressor(8, p)
    entries, returned = [], torch.zeros(48, 48)
    for _ in range(400):
        identity = torch.eye(64)[: shape[0], : shape[1]]
        send_back(p, identity)
        projection = accelerator.packs[p][:, :48] if shape[0] < shape[1] else accelerator.packs[p][:48].T
        entries.append(projection)
        returned += projection.T @ projection / 400
        accelerator.take_gradient(p)
    drawn = torch.stack(entries)
    assert drawn.shape == (400, 8, 48)
    assert drawn.mean().abs() < 4 * (1 / 8 / drawn.numel()) ** 0.5
    assert drawn.var() * 8 == pytest.approx(1, abs=0.02)
    assert ((drawn * 8**0.5).pow(4).mean()) == pytest.approx(3, abs=0.1)  # the fourth moment of a normal
    # E[A.T A] = I; an off-diagonal entry of one draw has variance 1/8.
    assert (returned - torch.eye(48)).abs().max() < 6 * (2 / 8 / 400) ** 0.5


def test_a_projection_lasts_one_accumulation():
    p = torch.nn.Parameter(torch.zeros(16, 32))
    accelerator = make_compressor(4, p)
    seeds = []
    for _ in range(3):
        for _ in range(2):
            send_back(p, torch.ones(16, 32))
            seeds.append(accelerator.seeds[p])
        accelerator.take_gradient(p)
    assert seeds[0::2] == seeds[1::2] and len(set(seeds)) == 3


@pytest.mark.parametrize("shape", [(16, 32), (32, 16)])
def test_momentum_moves_between_subspaces_every_kappa_steps(shape):
    """M ← β A' A.T M + (1 - β) A' G, A' = A but every κ steps; the weight takes (1 - β) G + β A.T M."""
    kappa, beta, rate, rank = 3, 0.9, 0.5, 4
    rest = {"lr": rate, "scale_parameter": False, "clip_threshold": math.inf}
    p, bare = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    flora = Flora([p], rank=rank, kappa=kappa, beta1=beta, **rest)
    # Adafactor's step without momentum is the G that the momentum is taken of.
    adafactor = Flora([bare], **rest)
    momentum, seed = torch.zeros(rank, 32), flora.state[p]["seed"]
    for step in range(1, 8):
        before, bare_before = p.detach().clone(), bare.detach().clone()
        p.grad = torch.randn(shape)
        bare.grad = p.grad.clone()
        flora.step()
        adafactor.step()
        g = (bare_before - bare.detach()) / rate
        g = g if shape[0] < shape[1] else g.T
        update = (before - p.detach()) / rate
        update = update if shape[0] < shape[1] else update.T
        old = _projection(seed, shape, rank)
        torch.testing.assert_close(update, (1 - beta) * g + beta * old.T @ momentum, rtol=1e-3, atol=1e-4)
        resampled = flora.state[p]["seed"] != seed
        assert resampled == (step % kappa == 0)
        seed = flora.state[p]["seed"]
        new = _projection(seed, shape, rank)
        carried = new @ (old.T @ momentum) if resampled else momentum
        momentum = beta * carried + (1 - beta) * new @ g
        state = flora.state[p]["exp_avg"]
        torch.testing.assert_close(state if shape[0] < shape[1] else state.T, momentum, rtol=1e-3, atol=1e-4)


def test_lora_matrices_are_compressed_and_embeddings_are_not():
    run = Run(make_options(optimizer_name="Flora", optimizer_rank=4))
    run.train(make_updates(1))
    state = run.optimizer.state
    shapes = {name: tuple(state[p]["exp_avg"].shape) for name, p in run.model.named_parameters()}
    assert shapes["lora_A.weight"] == (4, 32) and shapes["lora_B.weight"] == (32, 4)
    assert shapes["embed.weight"] == (40, 24)


def _projection(seed: int, shape: tuple[int, int], rank: int) -> torch.Tensor:
    """A [rank, 16] as upstream draws it from a parameter's seed, for either side."""
    left, right = upstream.split_seed(seed)
    if shape[0] < shape[1]:
        return upstream.stable_randn((rank, shape[0]), left) / rank**0.5
    return (upstream.stable_randn((shape[1], rank), right) / rank**0.5).T


def _pack_shape(p: torch.Tensor, rank: int) -> tuple[int, ...]:
    return (max(p.shape), rank) if p.dim() == 2 else tuple(p.shape)

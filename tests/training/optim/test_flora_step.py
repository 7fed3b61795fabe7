"""Flora's step against the package it comes from."""

import pytest
import torch
from flora_opt.optimizers.torch import flora as upstream

from caption_train.training.optim.flora import Flora


def step_both(p: torch.Tensor, steps: int, **settings) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
    """Return the weight and the state after our steps and after the package's."""
    ours, theirs = (torch.nn.Parameter(p.clone()) for _ in range(2))
    settings |= {"lr": 0.01, "scale_parameter": False, "kappa": 2}
    first, second = Flora([ours], **settings), Flora([theirs], **settings)
    for seed in range(steps):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
        ours.grad = gradient.clone()
        first.step()
        with torch.no_grad():
            upstream.flora_step_(second, second.param_groups[0], theirs, gradient.clone())
    return ours, theirs, first.state[ours], second.state[theirs]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (7,), (4, 3, 2, 2), ()])
@pytest.mark.parametrize("changes", [{}, {"rank": 4}, {"rank": 4, "beta1": None}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_packages_to_the_bit(shape, changes, dtype):
    settings = {"rank": None, "beta1": 0.9} | changes
    ours, theirs, state, other = step_both(torch.randn(shape, dtype=dtype), 5, **settings)
    assert torch.equal(ours, theirs) and state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_the_gradient_is_dropped_while_the_weight_steps():
    p = torch.nn.Parameter(torch.randn(8, 8))
    p.grad = torch.ones(8, 8)
    Flora([p], rank=2, beta1=0.9, lr=0.1).step()
    assert p.grad is None

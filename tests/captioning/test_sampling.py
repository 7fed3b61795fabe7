"""Sampling by Gumbel noise: the right distribution, and independent of the batch."""

import torch

from caption_train.captioning.sampling import make_sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def draw(names, *, temperature=1.0, top_p=1.0, seed=0):
    sampler = make_sampler(names, temperature=temperature, top_p=top_p, seed=seed)
    return sampler(None, LOGITS.repeat(len(names), 1)).argmax(1)


def test_tokens_are_drawn_with_the_softmax_probabilities():
    counts = draw([str(i) for i in range(20_000)], temperature=2.0).bincount(minlength=4)
    torch.testing.assert_close(counts / 20_000, (LOGITS / 2).softmax(0), atol=0.015, rtol=0)


def test_top_p_leaves_the_unlikely_tokens_out():
    assert draw([str(i) for i in range(2_000)], top_p=0.8).max() == 1


def test_a_row_draws_the_same_alone_and_among_others():
    names = [f"{i}.png" for i in range(20)]
    alone = torch.cat([draw([name]) for name in names])
    assert torch.equal(draw(names), alone)
    assert not torch.equal(draw(names, seed=1), alone)


def test_a_name_that_is_not_utf_8_is_a_seed_too():
    assert torch.equal(draw(["\udcff.png"]), draw(["\udcff.png"]))

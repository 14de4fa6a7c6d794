"""Exercise 10: PPO's clipped surrogate: values and gradients in all six cases."""

import math
from functools import partial

import pytest
import torch
from check import expect as expect_

import rlhf

pytestmark = pytest.mark.exercise(n=10)
expect = partial(expect_, 10)
tensor = partial(torch.tensor, dtype=torch.float64)

RATIOS = [[0.5, 1.1, 1.5]]  # below, within and above 1 - c ... 1 + c for c = 0.2


def loss_at_ratio(ratio, advantage, clip):
    old_logps = torch.full_like(ratio, -2.0)
    return rlhf.ppo_loss(old_logps + ratio.log(), old_logps, torch.full_like(ratio, advantage), clip)


def slope_at_ratio(ratio, advantage, clip):
    """d loss / d logps."""
    old_logps = torch.full_like(ratio, -2.0)
    logps = (old_logps + ratio.log()).requires_grad_()
    loss = rlhf.ppo_loss(logps, old_logps, torch.full_like(ratio, advantage), clip)
    return torch.autograd.grad(loss.sum(), logps)


def test_log_probs_enter_as_a_ratio():
    expect([[-math.exp(0.1)]], rlhf.ppo_loss, tensor([[-1.0]]), tensor([[-1.1]]), tensor([[1.0]]), 0.2,
           because="A is 1, and the ratio exp(-1 + 1.1)")


def test_a_good_token():
    expect([[-1.0, -2.2, -2.4]], loss_at_ratio, tensor(RATIOS), 2.0, 0.2,
           because="nothing is gained above 1 + c; below 1 - c everything still counts")


def test_a_bad_token():
    expect([[1.6, 2.2, 3.0]], loss_at_ratio, tensor(RATIOS), -2.0, 0.2,
           because="nothing is gained below 1 - c; above 1 + c everything still counts")


def test_a_good_token_stops_pulling_once_it_is_likely_enough():
    expect([[[-1.0, -2.2, 0.0]]], slope_at_ratio, tensor(RATIOS), 2.0, 0.2,
           because="-ratio A, or 0 where it has gone far enough")


def test_a_bad_token_stops_pushing_once_it_is_unlikely_enough():
    expect([[[0.0, 2.2, 3.0]]], slope_at_ratio, tensor(RATIOS), -2.0, 0.2,
           because="-ratio A, or 0 where it has gone far enough")


def test_at_the_old_policy_it_is_the_plain_policy_gradient():
    expect([[[-3.0, -3.0]]], slope_at_ratio, tensor([[1.0, 1.0]]), 3.0, 0.2)


def test_the_clip_is_an_argument():
    expect([[-1.0, -2.0 * 1.1, -2.0 * 1.4]], loss_at_ratio, tensor(RATIOS), 2.0, 0.4)
    expect([[1.2, 2.2, 3.0]], loss_at_ratio, tensor(RATIOS), -2.0, 0.4)

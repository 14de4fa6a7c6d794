"""Exercise 4: the IPO loss, by hand."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import coverage
import dpo

pytestmark = pytest.mark.exercise(n=4)
expect = partial(expect_, 4)
tensor = partial(torch.tensor, dtype=torch.float64)


def test_zero_where_the_margin_is_the_target():
    expect([0.0], dpo.ipo_loss, tensor([3.0]), tensor([-2.0]), beta=0.1,
           because="the margin is 5 nats, and so is 1/(2 beta)")


def test_three_pairs_by_hand():
    # the target is 2; margins 1, -1, 5
    expect([1.0, 9.0, 9.0], dpo.ipo_loss, tensor([0.5, -1.0, 4.0]), tensor([-0.5, 0.0, -1.0]), beta=0.25,
           because="too large a margin costs as much as too small a one")


def test_at_pi_ref_it_is_one_over_four_beta_squared():
    expect([25.0], dpo.ipo_loss, tensor([0.0]), tensor([0.0]), beta=0.1)


def test_its_slope():
    def gradients_of_ipo_loss(chosen_logratio, rejected_logratio, beta):
        inputs = chosen_logratio.requires_grad_(), rejected_logratio.requires_grad_()
        return torch.autograd.grad(dpo.ipo_loss(*inputs, beta).sum(), inputs)
    expect([[-2.0], [2.0]], gradients_of_ipo_loss, tensor([0.5]), tensor([-0.5]), 0.25)


def test_the_theory_file_has_it_as_a_function_of_the_margin():
    expect([[1.0, 9.0, 9.0]], coverage.ipo, tensor([[1.0, -1.0, 5.0]]), 0.25)

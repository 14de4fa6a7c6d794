"""Exercise 3: the DPO loss, by hand."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import coverage
import dpo

pytestmark = pytest.mark.exercise(n=3)
expect = partial(expect_, 3)
tensor = partial(torch.tensor, dtype=torch.float64)


def test_log_2_where_the_policy_is_pi_ref():
    expect([0.6931472, 0.6931472], dpo.dpo_loss, tensor([0.0, -3.0]), tensor([0.0, -3.0]), beta=0.1)


def test_two_pairs_by_hand():
    # margins 3 and -3, times beta 1.5 and -1.5; log(1 + e^-1.5) = 0.2014133, log(1 + e^1.5) = 1.7014133
    expect([0.2014133, 1.7014133], dpo.dpo_loss, tensor([2.0, -1.0]), tensor([-1.0, 2.0]), beta=0.5)


def test_only_the_difference_of_the_log_ratios_counts():
    expect([0.2014133], dpo.dpo_loss, tensor([-97.0]), tensor([-100.0]), beta=0.5)


def test_margins_of_thousands_of_nats_stay_finite():
    expect([2000.0, 0.0], dpo.dpo_loss, tensor([0.0, 2000.0]), tensor([2000.0, 0.0]), beta=1.0)


def test_its_slope():
    def gradients_of_dpo_loss(chosen_logratio, rejected_logratio, beta):
        inputs = chosen_logratio.requires_grad_(), rejected_logratio.requires_grad_()
        return torch.autograd.grad(dpo.dpo_loss(*inputs, beta).sum(), inputs)
    expect([[-0.0912128], [0.0912128]], gradients_of_dpo_loss, tensor([2.0]), tensor([-1.0]), 0.5,
           because="beta sigmoid(-1.5) up for the rejected, down for the chosen")


def test_the_theory_file_has_it_as_a_function_of_the_margin():
    expect([[0.2014133, 1.7014133, 3000.0]], coverage.dpo, tensor([[3.0, -3.0, -6000.0]]), 0.5)

"""Exercise 5: the Bradley-Terry loss of a reward model, by hand."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import rlhf

pytestmark = pytest.mark.exercise(n=5)
expect = partial(expect_, 5)
tensor = partial(torch.tensor, dtype=torch.float64)


def test_log_2_where_the_scores_are_equal():
    expect([0.6931472, 0.6931472], rlhf.reward_loss, tensor([0.0, 4.0]), tensor([0.0, 4.0]))


def test_two_pairs_by_hand():
    # log(1 + e^-3) = 0.0485874 and log(1 + e^3) = 3.0485874
    expect([0.0485874, 3.0485874], rlhf.reward_loss, tensor([2.0, -1.0]), tensor([-1.0, 2.0]))


def test_a_shift_of_the_reward_changes_nothing():
    expect([0.0485874], rlhf.reward_loss, tensor([52.0]), tensor([49.0]))


def test_a_confident_mistake_stays_finite():
    expect([2000.0, 0.0], rlhf.reward_loss, tensor([-1000.0, 1000.0]), tensor([1000.0, -1000.0]))


def test_its_slope():
    def gradients_of_reward_loss(chosen_scores, rejected_scores):
        inputs = chosen_scores.requires_grad_(), rejected_scores.requires_grad_()
        return torch.autograd.grad(rlhf.reward_loss(*inputs).sum(), inputs)
    expect([[-0.0474259], [0.0474259]], gradients_of_reward_loss, tensor([2.0]), tensor([-1.0]),
           because="sigmoid(-3): a pair that is ranked well teaches little")

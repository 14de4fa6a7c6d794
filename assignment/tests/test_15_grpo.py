"""Exercise 15: advantages normalised within a prompt, by hand."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import rlhf

pytestmark = pytest.mark.exercise(n=15)
expect = partial(expect_, 15)
tensor = partial(torch.tensor, dtype=torch.float64)

EPS = 3e-3  # many add something to the deviation, up to 1e-4


def test_three_samples_by_hand():
    # mean 3, deviation sqrt((4 + 1 + 9)/3) = 2.1602469; -2, -1 and 3 of it
    expect([[-0.9258201, -0.4629100, 1.3887301]], rlhf.grpo_advantages, tensor([[1.0, 2.0, 6.0]]), within=EPS,
           because="the mean square is 14/3, not the unbiased 7")


def test_of_two_samples_one_gets_1():
    expect([[-1.0, 1.0]], rlhf.grpo_advantages, tensor([[1.0, 4.0]]), within=EPS,
           because="mean 2.5, deviation 1.5")
    expect([[1.0, -1.0]], rlhf.grpo_advantages, tensor([[4.1, 4.0]]), within=EPS,
           because="however little they differ")


def test_each_prompt_has_a_mean_and_a_deviation_of_its_own():
    expect([[-1.0, 1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]], rlhf.grpo_advantages,
           tensor([[0.0, 2.0, 0.0, 2.0], [100.0, 100.0, 140.0, 140.0]]), within=EPS)


def test_a_prompt_whose_rewards_agree_teaches_nothing():
    expect([[0.0, 0.0], [-1.0, 1.0]], rlhf.grpo_advantages, tensor([[7.0, 7.0], [1.0, 4.0]]), within=EPS,
           because="not NaN")
    expect([[0.0] * 3], rlhf.grpo_advantages, tensor([[0.0] * 3]))


def test_what_rounding_leaves_of_equal_rewards_is_not_blown_up():
    expect([[0.0] * 7], rlhf.grpo_advantages, torch.tensor([[0.1] * 7]), within=EPS,
           because="in float32 the mean of 0.1, ..., 0.1 is not quite 0.1")


def test_one_sample_is_refused():
    def error_of_grpo_advantages(rewards):
        try:
            return rlhf.grpo_advantages(tensor(rewards))
        except ValueError:
            return "ValueError"
    expect("ValueError", error_of_grpo_advantages, [[1.0], [2.0]], because="one sample has no deviation")

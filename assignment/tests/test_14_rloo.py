"""Exercise 14: leave-one-out advantages, by hand."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import rlhf

pytestmark = pytest.mark.exercise(n=14)
expect = partial(expect_, 14)
tensor = partial(torch.tensor, dtype=torch.float64)


def test_three_samples_by_hand():
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
    expect([[-3.0, -1.5, 4.5]], rlhf.rloo_advantages, tensor([[1.0, 2.0, 6.0]]))


def test_two_samples_are_compared_with_each_other():
    expect([[-3.0, 3.0]], rlhf.rloo_advantages, tensor([[1.0, 4.0]]), because="1 - 4 and 4 - 1")


def test_each_prompt_has_a_baseline_of_its_own():
    expect([[-3.0, -1.5, 4.5], [-1.0, -1.0, 2.0], [0.0, 0.0, 0.0]], rlhf.rloo_advantages,
           tensor([[1.0, 2.0, 6.0], [100.0, 100.0, 102.0], [7.0, 7.0, 7.0]]),
           because="a prompt that pays well for every sample teaches nothing")


def test_a_baseline_without_the_sample_does_not_shrink_the_advantage():
    expect([[10.0, -2.5, -2.5, -2.5, -2.5]], rlhf.rloo_advantages, tensor([[10.0, 0.0, 0.0, 0.0, 0.0]]),
           because="10 - 0; with the sample in its own baseline it would be 8")

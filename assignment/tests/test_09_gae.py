"""Exercise 9: generalised advantage estimates and whitening, by hand."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import rlhf

pytestmark = pytest.mark.exercise(n=9)
expect = partial(expect_, 9)
tensor = partial(torch.tensor, dtype=torch.float64)

REWARDS, VALUES = [[1.0, 2.0, 3.0]], [[0.5, 1.0, 1.5]]
ALL = torch.ones(1, 3, dtype=torch.bool)
EPS = 1e-4  # many add some 1e-8 to the variance, or to its root


def test_lambda_one_half_by_hand():
    # delta_3 = 3 - 1.5 = 1.5, delta_2 = 2 + 1.5 - 1 = 2.5, delta_1 = 1 + 1 - 0.5 = 1.5
    # A_3 = 1.5, A_2 = 2.5 + 1.5/2 = 3.25, A_1 = 1.5 + 3.25/2 = 3.125
    expect([[3.125, 3.25, 1.5]], rlhf.gae, tensor(REWARDS), tensor(VALUES), ALL, 0.5)


def test_lambda_1_is_the_return_minus_the_value():
    expect([[5.5, 4.0, 1.5]], rlhf.gae, tensor(REWARDS), tensor(VALUES), ALL, 1.0)


def test_lambda_0_is_delta_alone():
    expect([[1.5, 2.5, 1.5]], rlhf.gae, tensor(REWARDS), tensor(VALUES), ALL, 0.0)


def test_padding_neither_receives_nor_passes_on():
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    # first row: delta_2 = 2 - 1 = 1, delta_1 = 1 + 1 - 0.5 = 1.5; second: delta = 1 everywhere, A = 1, 1.5, 1.75, 1.875
    expect([[2.0, 1.0, 0.0, 0.0], [1.875, 1.75, 1.5, 1.0]], rlhf.gae,
           tensor([[1.0, 2.0, 60.0, 90.0], [1.0, 1.0, 1.0, 1.0]]), tensor([[0.5, 1.0, 70.0, 80.0], [0.0] * 4]), mask,
           0.5, because="60 to 90 stand in padding")


def test_whitened_entries_have_mean_0_and_mean_square_1():
    expect([[-1.2247449, 0.0, 1.2247449]], rlhf.whiten, tensor([[1.0, 3.0, 5.0]]), ALL, within=EPS,
           because="the variance is the mean square, 8/3, not the unbiased 4")


def test_whitening_does_not_see_the_padding():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    expect([[-1.2247449, 0.0, 0.0], [0.0, 1.2247449, 0.0]], rlhf.whiten,
           tensor([[1.0, 90.0, 90.0], [3.0, 5.0, -90.0]]), mask, within=EPS,
           because="one mean for the batch; padding becomes 0")


def test_a_constant_becomes_0():
    expect([[0.0, 0.0, 0.0]], rlhf.whiten, tensor([[2.0, 2.0, 2.0]]), ALL, because="not NaN")

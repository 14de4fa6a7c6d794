"""Exercise 21: global and local coverage where the answer is known in closed form, and at the edges."""

import math
from functools import partial

import pytest
import torch
from check import expect as expect_

import coverage

pytestmark = pytest.mark.exercise(n=21)
expect = partial(expect_, 21)
tensor = partial(torch.tensor, dtype=torch.float64)

DOUBLES_A_QUARTER = 0.14384103622589045  # kl(1/2 || 1/4) = 1/2 log 2 + 1/2 log 2/3


def global_coverage(rho, mu):
    return coverage.global_coverage(tensor(rho), tensor(mu).log())


def local_coverage(rho, ref, eps_kl, mu=None):
    return coverage.local_coverage(tensor(rho), tensor(ref).log(), eps_kl, None if mu is None else tensor(mu).log())


def test_global_coverage_is_the_rarest_response():
    expect(20.0, global_coverage, [0.5, 0.5], [[0.2, 0.8], [0.05, 0.95]])


def test_global_coverage_at_the_edges():
    expect(math.inf, global_coverage, [1.0], [[0.5, 0.5, 0.0]], because="one response is in no pair")
    expect(5.0, global_coverage, [1.0, 0.0], [[0.2, 0.8], [0.05, 0.95]], because="the second prompt never comes")


def test_local_coverage_in_closed_form():
    expect(2.0, local_coverage, [1.0], [[0.25, 0.75]], DOUBLES_A_QUARTER,
           because="1/2 log 2 + 1/2 log 2/3 is this radius")


def test_a_rare_prompt_may_go_further_for_the_same_mean_kl():
    expect(2.0, local_coverage, [0.5, 0.5], [[0.25, 0.75], [0.75, 0.25]], DOUBLES_A_QUARTER / 2)
    expect(2.0, local_coverage, [0.1, 0.9], [[0.25, 0.75], [0.5, 0.5]], DOUBLES_A_QUARTER / 10,
           because="the whole budget goes to the prompt of weight 0.1")


def test_no_radius_leaves_pi_ref_alone():
    expect(1.0, local_coverage, [1.0], [[0.25, 0.75]], 0.0)


def test_a_wide_radius_reaches_every_response_that_pi_ref_has():
    expect(4.0, local_coverage, [1.0], [[0.25, 0.75]], 10.0)
    expect(4.0, local_coverage, [1.0], [[0.25, 0.75, 0.0]], 10.0, because="the third response has pi_ref = 0")
    expect(4.0, local_coverage, [1.0], [[0.25, 0.75]], math.inf)


def test_the_data_may_come_from_another_policy():
    expect(5.0, local_coverage, [1.0], [[0.25, 0.75]], DOUBLES_A_QUARTER, [[0.1, 0.9]],
           because="the policy reaches 1/2 where mu has 0.1")
    expect(math.inf, local_coverage, [1.0], [[0.25, 0.75]], 0.01, [[0.0, 1.0]], because="pi_ref says what no pair has")
    expect(10.0, local_coverage, [1.0], [[0.25, 0.75]], math.inf, [[0.1, 0.9]], because="y1 alone, where mu has 0.1")


def test_prompts_that_never_come_do_not_count():
    expect(2.0, local_coverage, [1.0, 0.0], [[0.25, 0.75], [0.001, 0.999]], DOUBLES_A_QUARTER)


def test_a_tiny_probability_keeps_its_digits():
    expect(6787055.8340583, local_coverage, [1.0], [[1e-9, 1 - 1e-9]], 0.1)

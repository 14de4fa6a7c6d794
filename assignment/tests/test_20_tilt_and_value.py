"""Exercise 20: KL, value, and the tilted policy, on the example of three responses and at the edges."""

import math
from functools import partial

import pytest
import torch
from check import expect as expect_

import coverage

pytestmark = pytest.mark.exercise(n=20)
expect = partial(expect_, 20)
tensor = partial(torch.tensor, dtype=torch.float64)

INF = math.inf
LOG_4 = math.log(4)
EXAMPLE = [1.0], [[0.5, 0.25, 0.25]], [[LOG_4, 0.0, 0.0]], 0.5  # rho, pi_ref, reward, beta
BEST = [[16 / 17, 1 / 34, 1 / 34]]  # 0.5 * 4^2 : 0.25 : 0.25
# two prompts, the first of which comes once in four times
TWO = [0.25, 0.75], [[0.5, 0.5], [0.75, 0.25]], [[1.0, 3.0], [0.0, 4.0]]  # rho, pi_ref, reward
PI = [[0.75, 0.25], [0.5, 0.5]]


def kl(rho, pi, other):
    return coverage.kl(tensor(rho), tensor(pi).log(), tensor(other).log())


def tilt(ref, reward, beta):
    return coverage.tilt(tensor(ref).log(), tensor(reward), beta).exp()


def log_partition(ref, reward, beta):
    return coverage.log_partition(tensor(ref).log(), tensor(reward), beta)


def V(rho, ref, reward, pi):
    return coverage.V(bandit(rho, ref, reward), tensor(pi).log())


def J(rho, ref, reward, beta, pi):
    return coverage.J(bandit(rho, ref, reward, beta), tensor(pi).log())


def bandit(rho, ref, reward, beta=1.0):
    return coverage.Bandit(tensor(rho), tensor(ref).log(), tensor(ref).log(), tensor(reward), beta)


def test_kl_by_hand_and_not_the_other_way_round():
    expect(0.1308120, kl, [1.0], [[0.75, 0.25]], [[0.5, 0.5]], because="3/4 log 3/2 + 1/4 log 1/2")


def test_kl_is_the_mean_over_prompts():
    expect(0.1405838, kl, [0.25, 0.75], PI, [[0.5, 0.5], [0.75, 0.25]], because="0.25 * 0.1308120 + 0.75 * 0.1438410")


def test_kl_at_the_edges():
    expect(0.6931472, kl, [1.0], [[1.0, 0.0]], [[0.5, 0.5]], because="0 log 0 is 0")
    expect(INF, kl, [1.0], [[0.5, 0.5]], [[1.0, 0.0]], because="pi says what the other never does")
    expect(0.1308120, kl, [1.0, 0.0], [[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [1.0, 0.0]],
           because="the second prompt never comes")


def test_value_by_hand():
    expect(1.875, V, *TWO, PI, because="0.25 (0.75 * 1 + 0.25 * 3) + 0.75 (0.5 * 0 + 0.5 * 4)")


def test_objective_by_hand():
    expect(1.875 - 2 * 0.1405838, J, *TWO, 2.0, PI, because="value - beta KL(pi || pi_ref)")


def test_the_tilted_policy_of_the_example():
    expect(BEST, tilt, [[0.5, 0.25, 0.25]], [[LOG_4, 0.0, 0.0]], 0.5, because="as 0.5 * 4^2 : 0.25 : 0.25")


def test_its_log_partition():
    expect([math.log(8.5)], log_partition, [[0.5, 0.25, 0.25]], [[LOG_4, 0.0, 0.0]], 0.5,
           because="Z = 0.5 * 4^2 + 0.25 + 0.25")


def test_its_objective_is_beta_log_z_and_no_policy_has_more():
    def J_is_below_beta_log_z(pi):
        return bool(J(*EXAMPLE, pi) < 0.5 * math.log(8.5))
    expect(0.5 * math.log(8.5), J, *EXAMPLE, BEST, because="beta log Z, Z = 0.5 * 4^2 + 0.25 + 0.25")
    for pi in ([[0.5, 0.25, 0.25]], [[0.9, 0.05, 0.05]], [[0.98, 0.01, 0.01]], [[0.94, 0.04, 0.02]]):
        expect(True, J_is_below_beta_log_z, pi)


def test_the_tilt_leaves_responses_that_pi_ref_lacks_alone():
    expect([[0.5, 0.5, 0.0]], tilt, [[0.5, 0.5, 0.0]], [[1.0, 1.0, 9.0]], 0.1)


def test_a_tiny_beta_does_not_overflow():
    expect([[0.0, 1.0]], tilt, [[0.5, 0.5]], [[0.0, 1.0]], 1e-4)
    expect([1e4 - 0.6931472], log_partition, [[0.5, 0.5]], [[0.0, 1.0]], 1e-4)

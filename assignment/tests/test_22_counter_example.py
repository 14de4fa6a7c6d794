"""Exercise 22: the family that offline losses cannot tell apart, and the one of it that HyPO picks."""

from functools import partial

import pytest
import torch
from check import expect as expect_

import coverage

pytestmark = pytest.mark.exercise(n=22)
expect = partial(expect_, 22)
tensor = partial(torch.tensor, dtype=torch.float64)


def bandit(mu, ref):
    """rho, reward and beta play no part here."""
    n = len(mu)
    return coverage.Bandit(tensor([1 / n] * n), tensor(ref).log(), tensor(mu).log(), tensor(ref), 1.0)


def with_unseen_mass(mu, pi, m):
    return coverage.with_unseen_mass(bandit(mu, mu), tensor(pi).log(), m).exp()


def nearest_to_ref(mu, ref, pi):
    return coverage.nearest_to_ref(bandit(mu, ref), tensor(pi).log()).exp()


def kl(pi, ref):
    return sum(p * (p / q).log() for p, q in zip(tensor(pi), tensor(ref)) if p > 0).item()


SEEN_2 = [[0.5, 0.5, 0.0]]  # the pairs hold y1 and y2 only
BEST = [[16 / 17, 1 / 34, 1 / 34]]


def test_half_of_the_mass_on_the_unseen_response():
    expect([[16 / 33, 1 / 66, 1 / 2]], with_unseen_mass, SEEN_2, BEST, 0.5, because="y1 : y2 stays 32 : 1")


def test_no_mass_and_nearly_all():
    expect([[32 / 33, 1 / 33, 0.0]], with_unseen_mass, SEEN_2, BEST, 0.0)
    expect([[0.32 / 33, 0.01 / 33, 0.99]], with_unseen_mass, SEEN_2, BEST, 0.99)


def test_the_margin_that_an_offline_loss_sees_is_the_same_for_every_m():
    def log_ratio_of_y1_and_y2(m):
        y1, y2, _ = with_unseen_mass(SEEN_2, BEST, m)[0]
        return (y1 / y2).log()
    for m in (0.0, 0.3, 0.999):
        expect(3.4657359, log_ratio_of_y1_and_y2, m, because="log 32")


def test_the_mass_is_spread_evenly_prompt_by_prompt():
    expect([[0.6, 0.2, 0.1, 0.1], [0.2 / 3, 0.2 / 3, 0.2 / 3, 0.8]], with_unseen_mass,
           [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], [[0.6, 0.2, 0.05, 0.15], [0.1, 0.2, 0.3, 0.4]], 0.2,
           because="the first prompt lacks y3 and y4, the second all but y4")


def test_hypos_choice_in_the_example():
    expect([[0.6707100, 0.0209597, 0.3083304]], nearest_to_ref, SEEN_2, [[0.5, 0.25, 0.25]], BEST,
           because="K = 32/33 log 64/33 + 1/33 log 4/33 = 0.5783577; before they are normalised the three are 0.5438, "
                   "0.0170 and pi_ref's 0.25")


def test_it_does_not_depend_on_the_mass_that_pi_had_on_unseen_responses():
    expect([[0.6707100, 0.0209597, 0.3083304]], nearest_to_ref, SEEN_2, [[0.5, 0.25, 0.25]], [[0.32, 0.01, 0.67]])


def test_it_has_the_least_kl_of_the_family():
    def kl_to_ref_minus_the_least_on_a_grid(mu, ref, pi):
        grid = [[[(1 - m) * 32 / 33, (1 - m) / 33, m]] for m in torch.linspace(0.001, 0.999, 999).tolist()]
        return kl(nearest_to_ref(mu, ref, pi)[0].tolist(), ref[0]) - min(kl(pi_m[0], ref[0]) for pi_m in grid)
    expect(0.0, kl_to_ref_minus_the_least_on_a_grid, SEEN_2, [[0.5, 0.25, 0.25]], BEST, within=1e-5)


def test_where_pairs_hold_everything_nothing_is_free():
    expect(BEST, nearest_to_ref, [[0.4, 0.3, 0.3]], [[0.5, 0.25, 0.25]], BEST)


def test_two_unseen_responses_keep_pi_refs_ratio():
    expect([[0.2, 0.2, 0.4, 0.2]], nearest_to_ref,
           [[0.5, 0.5, 0.0, 0.0]], [[0.2, 0.2, 0.4, 0.2]], [[0.4, 0.4, 0.1, 0.1]],
           because="among the seen pi has pi_ref's ratio: the nearest is pi_ref")

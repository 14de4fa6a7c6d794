"""Exercise 23: win rates and Wilson's interval, by hand."""

from functools import partial

import pytest
from check import expect as expect_

from eval import wilson_interval, win_rate

pytestmark = pytest.mark.exercise(n=23)
expect = partial(expect_, 23)


def test_a_tie_is_half_a_win():
    def rate(rewards, opponent_rewards):
        return win_rate(rewards, opponent_rewards)[0]
    expect(2.5 / 4, rate, [1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 4.0, -1.0])
    expect(0.5, rate, [0.0, 0.0], [0.0, 0.0])


def test_eight_wins_of_ten():
    # centre (8 + 1.9208) / 13.8416, half-width 1.96 sqrt(1.6 + 0.9604) / 13.8416
    expect([0.4901568, 0.9433191], wilson_interval, 8, 10, because="0.7167 -+ 0.2266")


def test_no_win_at_all_still_has_an_interval():
    expect([0.0, 0.2775402], wilson_interval, 0, 10, because="0 of 10 does not mean that the rate is 0")
    expect([0.7224598, 1.0], wilson_interval, 10, 10)


def test_half_a_win_counts_half():
    expect([0.2194220, 0.9081030], wilson_interval, 2.5, 4)


def test_another_level():
    expect([0.5407687, 0.9314482], wilson_interval, 8, 10, z=1.645)


def test_the_win_rate_comes_with_the_interval_of_its_wins():
    expect([0.625, [0.2194220, 0.9081030]], win_rate, [1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 4.0, -1.0])


def test_a_hundred_comparisons():
    expect([0.4038298, 0.5961702], wilson_interval, 50, 100)

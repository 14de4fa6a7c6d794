"""Exercise 12: the loss of the value function, by hand, and how PPO's objective is put together, on stand-ins.

The policy's log-prob of token i is -i, whatever stands before it; the value before token t is the sum of what stands
before it, prompt and response.
"""

from functools import partial

import pytest
import torch
from check import expect as expect_
from standins import EOS, policy_like, scorer_like

import rlhf
from lm import LM, Scorer

pytestmark = pytest.mark.exercise(n=12)
expect = partial(expect_, 12)
tensor = partial(torch.tensor, dtype=torch.float64)
Policy, Sums = policy_like(LM), scorer_like(Scorer)


# ---- value_loss


def value_loss(values, old_values, returns, clip):
    return rlhf.value_loss(tensor(values), tensor(old_values), tensor(returns), clip)


def slope(values, old_values, returns, clip):
    """d loss / d values."""
    inputs = tensor(values).requires_grad_()
    return torch.autograd.grad(rlhf.value_loss(inputs, tensor(old_values), tensor(returns), clip).sum(), inputs)[0]


def test_half_the_squared_error_near_the_old_value():
    expect([[4.5, 0.5]], value_loss, [[2.0, 2.0]], [[1.8, 2.2]], [[5.0, 1.0]], 0.5,
           because="V is 0.2 from V_old and c is 0.5: nothing is clipped")


def test_a_value_that_has_moved_towards_its_return_far_enough_is_not_rewarded():
    expect([[12.5]], value_loss, [[4.0]], [[0.0]], [[6.0]], 1.0, because="the clipped value is 1: (1 - 6)^2 / 2")
    expect([[0.0]], slope, [[4.0]], [[0.0]], [[6.0]], 1.0, because="so it stops pulling")


def test_a_value_that_has_moved_away_from_its_return_is_pulled_back():
    expect([[50.0]], value_loss, [[-4.0]], [[0.0]], [[6.0]], 1.0, because="(-4 - 6)^2 / 2 is more than (-1 - 6)^2 / 2")
    expect([[-10.0]], slope, [[-4.0]], [[0.0]], [[6.0]], 1.0)


def test_the_slope_near_the_old_value():
    expect([[-3.0, 1.0]], slope, [[2.0, 2.0]], [[1.8, 2.2]], [[5.0, 1.0]], 0.5)


# ---- ppo_objective

PROMPTS, RESPONSES = [[1], [2], [3]], [[4, EOS], [5, 6, 7, EOS], [8, 9]]
MASK = [[True, True, False, False], [True] * 4, [True, True, False, False]]
# of each row and token what was stored, in padding anything
OLD_LOGPS = [[-1.0, -2.0, 77.0, 77.0], [-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, 77.0, 77.0]]
OLD_VALUES = [[1.0, 2.0, 88.0, 88.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 88.0, 88.0]]
ADVANTAGES = [[1.0, -1.0, 99.0, 99.0], [2.0, -2.0, 3.0, -3.0], [4.0, -1.0, 99.0, 99.0]]
RETURNS = [[3.0, 1.0, 66.0, 66.0], [2.0, 4.0, 6.0, 8.0], [9.0, 5.0, 66.0, 66.0]]


def ppo_loss(logps, old_logps, advantages, clip):
    """Not PPO's."""
    return advantages * (logps - old_logps) + clip


def simple_value_loss(values, old_values, returns, clip):
    """Not PPO's."""
    return returns * (values + 2 * old_values) + clip


def objective(monkeypatch, rows):
    """(loss, gradient by the policy's scores, gradient by the value's weights)."""
    policy, value = Policy("policy", [-float(i) for i in range(10)]), Sums([float(i) for i in range(10)])
    monkeypatch.setattr(rlhf, "ppo_loss", ppo_loss)
    monkeypatch.setattr(rlhf, "value_loss", simple_value_loss)
    rolled = rlhf.Rollout(PROMPTS, RESPONSES, torch.tensor(MASK), torch.tensor(OLD_LOGPS),
                          torch.full((3, 4), 55.0), {})
    loss, _ = rlhf.ppo_objective(policy, value, rolled, torch.tensor(OLD_VALUES), torch.tensor(ADVANTAGES),
                                 torch.tensor(RETURNS), torch.tensor(rows))
    gradients = torch.autograd.grad(loss, [policy.score, value.weight], allow_unused=True)
    return loss, *(torch.zeros(10) if gradient is None else gradient for gradient in gradients)


def loss(monkeypatch):
    def loss_of_ppo_objective(rows):
        return objective(monkeypatch, rows)[0]
    return loss_of_ppo_objective


def test_one_response_by_hand(monkeypatch):
    expect(-9 + 0.4 + 232 + 1.0, loss(monkeypatch), [2], within=1e-5,
           because="4 (-8 + 5) - (-9 + 6) + 2 CLIP, and 9 (3 + 2 * 5) + 5 (11 + 2 * 6) + 2 VALUE_CLIP: A (logp - old "
                   "logp) + CLIP stands in for ppo_loss, R (V + 2 V_old) + VALUE_CLIP for value_loss")


def test_the_gradient_of_one_response(monkeypatch):
    def gradients_by_the_weights_of_policy_and_value(rows):
        return objective(monkeypatch, rows)[1:]
    expect([[-3, 0, 0, 0, 0, 2, -2, 3, 0, 0], [0, 0, 20, 0, 0, 18, 14, 8, 0, 0]],
           gradients_by_the_weights_of_policy_and_value, [1],
           because="the advantages of 5, 6, 7 and the EOS; and the returns 2, 4, 6, 8 of values that have seen the "
                   "prompt's 2, then 5, 6 and 7 as well; 99 and 66 stand in other rows' padding")


def test_the_mean_is_over_responses_and_padding_counts_nothing(monkeypatch):
    expect((14.4 + 368.8) / 2, loss(monkeypatch), [0, 1], within=1e-5,
           because="alone these two have -4.6 + 19 and -23.2 + 392, policy and value; they have 2 and 4 tokens")


def test_rows_may_come_in_any_order(monkeypatch):
    expect((224.4 + 14.4) / 2, loss(monkeypatch), [2, 0], within=1e-5,
           because="alone these two have -8.6 + 233 and -4.6 + 19, policy and value; what was stored is 4 tokens "
                   "wide, and they have 2")
    expect((224.4 + 14.4 + 368.8) / 3, loss(monkeypatch), [1, 2, 0], within=1e-5, because="the third has 368.8")

"""Exercise 7: how the loop of DPO, IPO and Bo2 is wired. Losses and policy are stand-ins with simple numbers.

The policy's log-prob of a response is the sum of its tokens' scores, -i for token i. What the tests look at is the
gradient by these scores that is there when the optimizer takes its step.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, growth, policy_like, rounded, watch

import dpo
import run
from lm import LM, Encoded

pytestmark = pytest.mark.exercise(n=7)
expect = partial(expect_, 7)
Policy = policy_like(LM)

# log pi is -3, -4 and -5, -12; the log-ratios h are -1, -2 and -3, -6
FIRST = [Encoded([1], [3, EOS], [4, EOS], -2.0, -2.0), Encoded([2], [5, EOS], [6, 6, EOS], -2.0, -6.0)]
SECOND = [Encoded([1], [7, EOS], [8, EOS], -6.0, -6.0)]  # h is -1, -2


def dpo_loss(chosen_logratio, rejected_logratio, beta):
    """Not the DPO loss."""
    return beta * chosen_logratio * (1 - rejected_logratio)


def ipo_loss(chosen_logratio, rejected_logratio, beta):
    """Not the IPO loss."""
    return beta * chosen_logratio * (5 - rejected_logratio)


def bo2_loss(chosen_logps):
    """Not the Bo2 loss."""
    return chosen_logps ** 2


def train(monkeypatch, loss="dpo", batches=(FIRST,), lr=0.0, max_grad_norm=1000.0, length_average=False):
    """The updates of dpo.train with beta = 2, on these pairs in turn."""
    policy = Policy("policy", [-float(i) for i in range(10)])
    updates = watch(monkeypatch, run, policy=policy.score)
    for name, function in ("dpo_loss", dpo_loss), ("ipo_loss", ipo_loss), ("bo2_loss", bo2_loss):
        monkeypatch.setattr(dpo, name, function)
    args = SimpleNamespace(loss=loss, beta=2.0, steps=len(batches), lr=lr, batch_size=2, seed=0, device="cpu",
                           max_grad_norm=max_grad_norm, length_average=length_average)
    dpo.train(policy, lambda step: batches[step.number - 1], lambda policy: {}, args)
    return updates


def gradient(monkeypatch, **how):
    return train(monkeypatch, **how)[0].gradient["policy"]


# means over two pairs, beta = 2: chosen 3 gets 1 + 2, rejected 4 gets 1, chosen 5 gets 1 + 6, each rejected 6 gets 3
OF_DPO = [14, 0, 0, 3, 1, 7, 6, 0, 0, 0]


def test_the_gradient_of_a_step_of_dpo(monkeypatch):
    def gradient_by_the_scores_of_tokens(loss):
        return gradient(monkeypatch, loss=loss)
    expect(OF_DPO, gradient_by_the_scores_of_tokens, "dpo",
           because="the mean over two pairs of dpo_loss, here beta h+ (1 - h-), with beta = 2; of whole responses h+ "
                   "is -1 and -3, h- is -2 and -6")


def test_the_gradient_of_a_step_of_ipo(monkeypatch):
    def gradient_by_the_scores_of_tokens(loss):
        return gradient(monkeypatch, loss=loss)
    expect([22, 0, 0, 7, 1, 11, 6, 0, 0, 0], gradient_by_the_scores_of_tokens, "ipo",
           because="the mean over two pairs of ipo_loss, here beta h+ (5 - h-), with beta = 2; h+ is -1 and -3, h- is "
                   "-2 and -6")


def test_log_ratios_divided_by_the_length(monkeypatch):
    def gradient_by_the_scores_of_tokens(loss, length_average):
        return gradient(monkeypatch, loss=loss, length_average=length_average)
    # h are -1/2, -2/2 and -3/2, -6/3: chosen 3 gets (5 + 1)/2, 4 gets 1/2 / 2, 5 gets (5 + 2)/2, each 6 gets 3/2 / 3
    expect([3 + 0.25 + 3.5 + 0.5, 0, 0, 3, 0.25, 3.5, 1, 0, 0, 0], gradient_by_the_scores_of_tokens, "ipo", True,
           because="each by its own length, the EOS included: h+ is -1/2 and -3/2, h- is -2/2 and -6/3")


def test_the_gradient_of_a_step_of_best_of_2(monkeypatch):
    def gradient_by_the_scores_of_tokens(loss):
        return gradient(monkeypatch, loss=loss)
    expect([-8, 0, 0, -3, 0, -5, 0, 0, 0, 0], gradient_by_the_scores_of_tokens, "bo2", within=1e-5,
           because="the mean over two pairs of bo2_loss, here (log pi(y+))^2; log pi(y+) is -3 and -5, its ratio to "
                   "pi_ref -1 and -3")


def test_each_step_takes_its_own_pairs(monkeypatch):
    def gradients_of_two_steps():
        return [update.gradient["policy"] for update in train(monkeypatch, batches=(FIRST, SECOND))]
    expect([OF_DPO, [8, 0, 0, 0, 0, 0, 0, 6, 2, 0]], gradients_of_two_steps,
           because="pairs_of gives two pairs in the first step, and another one in the second")


def test_a_step_without_pairs_is_left_out_and_training_goes_on(monkeypatch):
    def steps_in_which_the_policy_was_updated():
        return [update.step for update in train(monkeypatch, batches=(FIRST, [], SECOND))]
    expect([1, 3], steps_in_which_the_policy_was_updated, because="all of the second step's prompts were ties")


def test_the_gradient_is_clipped_before_the_step(monkeypatch):
    def norm_of_the_gradient(max_grad_norm):
        return torch.tensor(gradient(monkeypatch, max_grad_norm=max_grad_norm)).norm()
    expect(0.5, norm_of_the_gradient, 0.5, within=1e-5, because="its own norm is 17.1")


def test_a_step_does_not_add_to_the_gradient_of_the_one_before(monkeypatch):
    def growth_of_the_gradient(lr):
        return growth([update.gradient["policy"] for update in train(monkeypatch, batches=(FIRST,) * 3, lr=lr)])
    expect([1, 1, 1], growth_of_the_gradient, 0.0, because="at a rate of 0 nothing moves: all are the same")


def test_the_policy_goes_down_by_the_learning_rate(monkeypatch):
    def change_of_the_scores(lr):
        return rounded(train(monkeypatch, lr=lr)[0].moved["policy"])
    expect([-0.01 * (g > 0) for g in OF_DPO], change_of_the_scores, 0.01, within=1e-5,
           because="AdamW's first step: lr against the gradient's sign, and without weight decay none elsewhere")

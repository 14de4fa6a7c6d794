"""Exercise 6: how a step of the reward model is wired. Loss and network are stand-ins with simple numbers.

A stand-in's score is the sum of the weights of prompt and response; the weight of token i is i. What the tests look
at is the gradient by these weights that is there when the optimizer takes its step.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, growth, rounded, scorer_like, watch

import rlhf
import run
from lm import Encoded, Scorer

pytestmark = pytest.mark.exercise(n=6)
expect = partial(expect_, 6)
Sums = scorer_like(Scorer)

# scores 4 and 5, then 7 and 14; the last pair is in no minibatch
PAIRS = [Encoded([1], [3, EOS], [4, EOS]), Encoded([2], [5, EOS], [6, 6, EOS]), Encoded([9], [9, EOS], [9, EOS])]
# by the weights of tokens 0 to 9, half of: chosen 3 gets 2 + 5, rejected 4 gets 4, chosen 5 gets 2 + 14, each 6 gets 7;
# the prompts and the EOS get the sum of their responses'
GRADIENT = [17, 5.5, 11.5, 3.5, 2, 8, 7, 0, 0, 0]


def reward_loss(chosen_scores, rejected_scores):
    """Not the Bradley-Terry loss."""
    return chosen_scores * (2 + rejected_scores)


def train(monkeypatch, steps=1, lr=0.0, max_grad_norm=1000.0):
    """The updates of rlhf.train_reward with two pairs in a minibatch."""
    scorer = Sums([float(i) for i in range(10)])
    updates = watch(monkeypatch, run, scorer=scorer.weight)
    monkeypatch.setattr(rlhf, "reward_loss", reward_loss)
    args = SimpleNamespace(steps=steps, lr=lr, batch_size=2, seed=0, device="cpu", max_grad_norm=max_grad_norm)
    rlhf.train_reward(scorer, PAIRS, lambda scorer: {}, args)
    return updates


def test_the_gradient_of_a_step(monkeypatch):
    def gradient_by_the_weights_of_tokens():
        return train(monkeypatch)[0].gradient["scorer"]
    expect(GRADIENT, gradient_by_the_weights_of_tokens,
           because="the mean over two pairs of reward_loss, here chosen (2 + rejected); the chosen have scores 4 and "
                   "7, the rejected 5 and 14")


def test_the_gradient_is_clipped_before_the_step(monkeypatch):
    def norm_of_the_gradient(max_grad_norm):
        return torch.tensor(train(monkeypatch, max_grad_norm=max_grad_norm)[0].gradient["scorer"]).norm()
    expect(0.5, norm_of_the_gradient, 0.5, within=1e-5, because="its own norm is 24.1")


def test_a_step_does_not_add_to_the_gradient_of_the_one_before(monkeypatch):
    def growth_of_the_gradient(lr, steps):
        return growth([update.gradient["scorer"] for update in train(monkeypatch, steps, lr)])
    expect([1, 1, 1], growth_of_the_gradient, 0.0, 3, because="at a rate of 0 nothing moves: all are the same")


def test_the_weights_go_down_by_the_learning_rate_and_decay(monkeypatch):
    def change_of_the_weights(lr):
        return rounded(train(monkeypatch, lr=lr)[0].moved["scorer"])
    expect([-0.01 * (g > 0) - 0.001 * i for i, g in enumerate(GRADIENT)], change_of_the_weights, 0.01, within=1e-5,
           because="AdamW's first step: lr against the gradient's sign, and lr WEIGHT_DECAY of the weight itself")

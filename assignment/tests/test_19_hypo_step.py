"""Exercise 19: how a step of HyPO is wired. Losses and models are stand-ins with simple numbers.

A stand-in's log-prob of a response is the sum of its tokens' scores: -token for the policy, -token/2 for pi_ref. What
the tests look at is the gradient by these scores that is there when the optimizer takes its step.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, growth, policy_like, rounded, watch

import hypo
import run
from lm import LM, Encoded

pytestmark = pytest.mark.exercise(n=19)
expect = partial(expect_, 19)
Policy = policy_like(LM)

# of the policy log pi is -3, -4 and -5, -12; the log-ratios are -1.5, -2 and -2.5, -6
PAIRS = [Encoded([1], [3, EOS], [4, EOS], -1.5, -2.0), Encoded([2], [5, EOS], [6, 6, EOS], -2.5, -6.0),
         Encoded([11], [11, EOS], [11, EOS], -99.0, 99.0)]  # the last is in no minibatch
# the first, second and third sample to a prompt
SAMPLES = {prompt: [[first, EOS] for first in firsts] for prompt, firsts in (
    (1, [7, 8, 11]), (2, [9, 10, 11]), (11, [11, 11, 11]))}
# the gradient by the scores of tokens 0 to 11. Of the pairs: the chosen 3 and 5, the rejected 4 and 6, and the EOS;
OF_PAIRS = [-8, 0, 0, -1.5, -1, -2.5, -6, 0, 0, 0, 0, 0]
# of two samples a prompt: the log-ratios of the first ones are -3.5 and -4.5, the second samples count twice
OF_SAMPLES = [-12, 0, 0, 0, 0, 0, 0, -1.75, -3.5, -2.25, -4.5, 0]


def dpo_loss(chosen_logratio, rejected_logratio, beta):
    """Not the DPO loss."""
    return beta * (2 * chosen_logratio ** 2 + rejected_logratio ** 2)


def kl_loss(logps, logratios):
    """Not HyPO's: the first sample's logp + twice the second's ..., times the first sample's log-ratio."""
    return logps @ torch.arange(1.0, logps.shape[1] + 1) * logratios[:, 0].detach()


def train(monkeypatch, lam=1.0, k=2, steps=1, lr=0.0, max_grad_norm=1000.0):
    """([Sampled], [Update]) of hypo.train with beta = 0.5."""
    sampled = []
    policy = Policy("policy", [-float(token) for token in range(12)], SAMPLES, sampled)
    ref = Policy("ref", [-token / 2 for token in range(12)], SAMPLES, sampled, trained=False)

    def begin():
        """Samples are numbered from 1 again."""
        policy.asked.clear()
        ref.asked.clear()

    updates = watch(monkeypatch, run, begin, policy=policy.score, ref=ref.score)
    monkeypatch.setattr(hypo, "dpo_loss", dpo_loss)
    monkeypatch.setattr(hypo, "kl_loss", kl_loss)
    args = SimpleNamespace(beta=0.5, lam=lam, k=k, steps=steps, lr=lr, batch_size=2, max_new_tokens=5, seed=0,
                           device="cpu", max_grad_norm=max_grad_norm)
    hypo.train(policy, ref, PAIRS, lambda policy: {}, args)
    return sampled, updates


def test_the_policy_samples_k_times_to_each_prompt_of_the_minibatch(monkeypatch):
    def who_samples_to_which_prompts(k):
        sampled, _ = train(monkeypatch, k=k)
        return sorted({each.who for each in sampled}), sorted(prompt for each in sampled for prompt in each.prompts)
    expect([["policy"], [[1], [1], [1], [2], [2], [2]]], who_samples_to_which_prompts, 3)


def test_the_gradient_is_clipped_before_the_step(monkeypatch):
    def norm_of_the_gradient(lam, max_grad_norm):
        return torch.tensor(train(monkeypatch, lam, max_grad_norm=max_grad_norm)[1][0].gradient["policy"]).norm()
    expect(0.5, norm_of_the_gradient, 0.0, 0.5, within=1e-5, because="its own norm is 10.5")


def test_with_lam_0_the_update_is_that_of_the_pairs(monkeypatch):
    def gradient_by_the_scores_of_tokens(lam):
        return train(monkeypatch, lam)[1][0].gradient["policy"]
    expect(OF_PAIRS, gradient_by_the_scores_of_tokens, 0.0,
           because="mean over the minibatch's two pairs of loss_dpo; the log-ratios are -1.5, -2.5 of the chosen 3, 5 "
                   "and -2, -6 of the rejected 4, 6; token 11 is in no minibatch")


def test_the_gradient_of_a_step(monkeypatch):
    def gradient_by_the_scores_of_tokens(lam, k):
        return train(monkeypatch, lam, k)[1][0].gradient["policy"]
    expect([a + 0.25 * b for a, b in zip(OF_PAIRS, OF_SAMPLES)], gradient_by_the_scores_of_tokens, 0.25, 2,
           because="mean of loss_dpo + lam times mean of loss_kl; one prompt's samples are 7, 8, the other's 9, 10; "
                   "kl_loss stands for (first logp + 2 second logp) times the first log-ratio, -3.5 and -4.5")


def test_one_sample_a_prompt(monkeypatch):
    def gradient_by_the_scores_of_tokens(lam, k):
        return train(monkeypatch, lam, k)[1][0].gradient["policy"]
    of_samples = [-4, 0, 0, 0, 0, 0, 0, -1.75, 0, -2.25, 0, 0]
    expect([a + 0.25 * b for a, b in zip(OF_PAIRS, of_samples)], gradient_by_the_scores_of_tokens, 0.25, 1,
           because="a sample's log-ratio weighs all its tokens, the EOS too; kl_loss gets (2, 1): two prompts with "
                   "one sample each")


def test_samples_are_the_policys_own_up_to_the_limit(monkeypatch):
    def limit_and_temperature(k):
        return train(monkeypatch, k=k)[0][0][2:4]
    expect([5, 1.0], limit_and_temperature, 2, because="args.max_new_tokens is 5; y ~ pi has temperature 1")


def test_a_step_does_not_add_to_the_gradient_of_the_one_before(monkeypatch):
    def growth_of_the_gradient(lam, lr, steps):
        return growth([update.gradient["policy"] for update in train(monkeypatch, lam, steps=steps, lr=lr)[1]])
    expect([1, 1, 1], growth_of_the_gradient, 0.0, 0.0, 3, because="at a rate of 0 nothing moves: all are the same")


def test_the_policy_goes_down_by_the_learning_rate(monkeypatch):
    def change_of_the_scores(lam, lr):
        return rounded(train(monkeypatch, lam, lr=lr)[1][0].moved["policy"])
    expect([0.01, 0, 0, 0.01, 0.01, 0.01, 0.01, 0, 0, 0, 0, 0], change_of_the_scores, 0.0, 0.01, within=1e-5,
           because="AdamW's first step: lr against the gradient's sign, and without weight decay none elsewhere")


def test_the_optimizer_moves_the_policy_alone(monkeypatch):
    def whose_weights_the_optimizer_holds(steps):
        return [*train(monkeypatch, steps=steps)[1][0].rate]
    expect(["policy"], whose_weights_the_optimizer_holds, 1)


def test_the_same_run_again_draws_the_same_samples(monkeypatch):
    def seeds_are_the_same_in_two_runs(steps):
        first, second = ([each.seed for each in train(monkeypatch, steps=steps)[0]] for _ in range(2))
        return first == second
    expect(True, seeds_are_the_same_in_two_runs, 3, because='step.generator("online") depends on --seed and the step')


def test_every_step_draws_fresh_samples_and_takes_one_update(monkeypatch):
    def different_seeds_and_updates(steps):
        sampled, updates = train(monkeypatch, steps=steps)
        return min(steps, len({each.seed for each in sampled})), len(updates)
    expect([3, 3], different_seeds_and_updates, 3, because="a generator of its own for each step")

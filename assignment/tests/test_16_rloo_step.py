"""Exercise 16: how a step without a critic is wired. Roll-out, advantages and policy are stand-ins.

The log-prob of a response is the sum of its tokens' scores. What the tests look at is the gradient by these scores
that is there when the optimizer takes its step.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, growth, policy_like, rounded, watch

import rlhf
import run
from lm import LM

pytestmark = pytest.mark.exercise(n=16)
expect = partial(expect_, 16)
Policy = policy_like(LM)

PROMPTS = ["1", "2", "3"]  # the last is in no minibatch
# the first and the second response to each prompt; for all of them token rewards that add up to 10 times the token
RESPONSES = {"1": [[3, EOS], [4, EOS]], "2": [[5, EOS], [6, EOS]], "3": [[7, EOS], [8, EOS]]}


def rloo_advantages(rewards):
    """Not RLOO's: the difference to the next sample."""
    return rewards - 2 * rewards.roll(-1, 1)


def grpo_advantages(rewards):
    """Not GRPO's."""
    return rewards ** 2 / 1000


def train(monkeypatch, grpo=False, steps=1, lr=0.0, max_grad_norm=1e6):
    """([who rolled out, with which reference, on what, with which seed], [Update]) of rlhf.train_rloo, k = 2."""
    policy, ref = Policy("policy", [-float(i) for i in range(10)]), Policy("ref", [0.0] * 10, trained=False)
    roll_outs = []

    def roll_out(who, reference, prompts, judge, generator, args):
        roll_outs.append([who.name, reference.name, list(prompts), judge, generator.initial_seed()])
        asked = {prompt: iter(RESPONSES[prompt]) for prompt in prompts}
        responses = [next(asked[prompt]) for prompt in prompts]
        rewards = torch.tensor([[9.0 * response[0], float(response[0])] for response in responses])
        return rlhf.Rollout([[int(prompt)] for prompt in prompts], responses, torch.ones_like(rewards).bool(),
                            torch.zeros_like(rewards), rewards, {})

    updates = watch(monkeypatch, run, policy=policy.score)
    for name, function in dict(roll_out=roll_out, rloo_advantages=rloo_advantages,
                               grpo_advantages=grpo_advantages).items():
        monkeypatch.setattr(rlhf, name, function)
    args = SimpleNamespace(k=2, grpo=grpo, rloo=not grpo, steps=steps, lr=lr, batch_size=2, seed=0, device="cpu",
                           max_grad_norm=max_grad_norm, beta=3.0, eos_penalty=1.0, max_new_tokens=2)
    rlhf.train_rloo(policy, ref, PROMPTS, "the judge", lambda policy: {}, args)
    return roll_outs, updates


# advantages are 30 - 80, 40 - 60, 50 - 120, 60 - 100, of the responses 3, 4, 5, 6, each over the four samples; all
# have the EOS
GRADIENT = [45, 0, 0, 12.5, 5, 17.5, 10, 0, 0, 0]


def gradient(monkeypatch, **how):
    return train(monkeypatch, **how)[1][0].gradient["policy"]


def test_the_gradient_of_a_step(monkeypatch):
    def gradient_by_the_scores_of_tokens():
        return gradient(monkeypatch)
    expect(GRADIENT, gradient_by_the_scores_of_tokens,
           because="of -mean over all samples of A log pi, a sum over tokens, 0 being everybody's EOS; the rewards "
                   "are 27 + 3, 36 + 4 and 45 + 5, 54 + 6, and rloo_advantages stands for a reward less twice that of "
                   "the prompt's other sample")


def test_grpo_has_the_other_advantages(monkeypatch):
    def gradient_by_the_scores_of_tokens(grpo):
        return gradient(monkeypatch, grpo=grpo)
    expect([-2.15, 0, 0, -0.225, -0.4, -0.625, -0.9, 0, 0, 0], gradient_by_the_scores_of_tokens, True,
           because="grpo_advantages stands for a thousandth of the rewards' squares: 30, 40 of the prompt with "
                   "responses 3, 4, and 50, 60 of that with 5, 6")


def test_the_policy_rolls_out_k_times_for_each_prompt_of_the_minibatch(monkeypatch):
    def who_with_which_reference_prompts_and_judge():
        (who, reference, prompts, judge, _), = train(monkeypatch)[0]
        return who, reference, sorted(prompts), judge
    expect(["policy", "ref", ["1", "1", "2", "2"], "the judge"], who_with_which_reference_prompts_and_judge,
           because="k is 2")


def test_every_step_rolls_out_with_fresh_numbers_and_takes_one_update(monkeypatch):
    def different_seeds_and_updates(steps):
        roll_outs, updates = train(monkeypatch, steps=steps)
        return len({seed for *_, seed in roll_outs}), len(updates)
    expect([3, 3], different_seeds_and_updates, 3, because="a generator of its own for each step")


def test_the_same_run_again_draws_the_same(monkeypatch):
    def seeds_are_the_same_in_two_runs(steps):
        first, second = ([seed for *_, seed in train(monkeypatch, steps=steps)[0]] for _ in range(2))
        return first == second
    expect(True, seeds_are_the_same_in_two_runs, 2, because="step.generator depends on --seed and the step")


def test_the_gradient_is_clipped_before_the_step(monkeypatch):
    def norm_of_the_gradient(max_grad_norm):
        return torch.tensor(gradient(monkeypatch, max_grad_norm=max_grad_norm)).norm()
    expect(0.5, norm_of_the_gradient, 0.5, within=1e-5, because="its own norm is 51.1")


def test_a_step_does_not_add_to_the_gradient_of_the_one_before(monkeypatch):
    def growth_of_the_gradient(lr, steps):
        return growth([update.gradient["policy"] for update in train(monkeypatch, steps=steps, lr=lr)[1]])
    expect([1, 1, 1], growth_of_the_gradient, 0.0, 3, because="at a rate of 0 nothing moves: all are the same")


def test_the_policy_moves_by_the_learning_rate(monkeypatch):
    def change_of_the_scores(lr):
        return rounded(train(monkeypatch, lr=lr)[1][0].moved["policy"])
    expect([-0.01 * (g > 0) for g in GRADIENT], change_of_the_scores, 0.01, within=1e-5,
           because="AdamW's first step: lr against the gradient's sign, and without weight decay none elsewhere")

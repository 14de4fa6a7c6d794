"""Exercise 8: two samples for each prompt, and which of them is chosen. Policies and judges are stand-ins.

The log-prob of a response is the sum of its tokens' scores: -i for token i under the policy, -i/2 under pi_ref.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, judge_by, policy_like

import dpo
from lm import LM

pytestmark = pytest.mark.exercise(n=8)
expect = partial(expect_, 8)
Policy = policy_like(LM)

SAMPLES = {1: [[3, EOS], [4, 5, EOS]], 2: [[6], [7, EOS]], 3: [[8, EOS], [8, 8, EOS]]}  # to each prompt two, then none
REWARDS = {"1: 3": 0.0, "1: 4 5": 2.0, "2: 6": 5.0, "2: 7": -1.0, "3: 8": 1.0, "3: 8 8": 1.0}
label = judge_by(REWARDS)


def other_judge(prompts, texts):
    """Of the opposite opinion: it measures, and labels nothing."""
    return [-reward for reward in label(prompts, texts)]


def make(prompts, seed=5):
    """(pairs, [Sampled]) of dpo.online_pairs."""
    sampled = []
    scores = torch.arange(12.0)
    policy = Policy("policy", (-scores).tolist(), SAMPLES, sampled)
    ref = Policy("ref", (-scores / 2).tolist(), {1: [[9, EOS]] * 2, 2: [[9, EOS]] * 2, 3: [[9, EOS]] * 2}, sampled,
                 trained=False)
    start = SimpleNamespace(policy=policy, ref=ref, label=label, outcome=other_judge, second=other_judge,
                            prompts=["3", "1", "2"], pairs=[])
    generator = torch.Generator().manual_seed(seed)
    return dpo.online_pairs(start, prompts, generator, SimpleNamespace(max_new_tokens=7, seed=0, device="cpu")), sampled


def prompt_chosen_rejected(prompts):
    return [pair[:3] for pair in make(prompts)[0]]


def test_the_better_response_is_chosen():
    expect([[[1], [4, 5, EOS], [3, EOS]]], prompt_chosen_rejected, ["1"], because="start.label gives them 0 and 2")
    expect([[[2], [6], [7, EOS]]], prompt_chosen_rejected, ["2"], because="start.label gives them 5 and -1")


def test_responses_to_one_prompt_are_compared_with_each_other():
    expect([[[1], [4, 5, EOS], [3, EOS]], [[2], [6], [7, EOS]]], prompt_chosen_rejected, ["1", "2"],
           because="start.label gives 0 and 2 for prompt 1, 5 and -1 for prompt 2")


def test_ties_are_left_out():
    expect([[[2], [6], [7, EOS]]], prompt_chosen_rejected, ["3", "2"], because="start.label gives both of prompt 3 a 1")
    expect([], prompt_chosen_rejected, ["3"])


def test_each_pair_knows_log_pi_ref_of_both():
    def log_pi_ref_of_chosen_and_rejected(prompts):
        return [[pair.ref_chosen, pair.ref_rejected] for pair in make(prompts)[0]]
    expect([[-4.5, -1.5], [-3.0, -3.5]], log_pi_ref_of_chosen_and_rejected, ["1", "2"],
           because="under pi_ref token i has log-prob -i/2")


def test_the_policy_writes_two_responses_to_each_prompt():
    def who_samples_to_which_prompts(prompts):
        sampled = make(prompts)[1]
        return sorted({each.who for each in sampled}), sorted(prompt for each in sampled for prompt in each.prompts)
    expect([["policy"], [[1], [1], [2], [2]]], who_samples_to_which_prompts, ["1", "2"])


def test_they_are_samples_of_the_policy_up_to_the_limit_from_the_given_generator():
    def limit_temperature_and_seed(prompts, seed):
        sampled = make(prompts, seed)[1]
        return sorted({each.limit for each in sampled}), sampled[0].temperature, sampled[0].seed
    expect([[7], 1.0, 5], limit_temperature_and_seed, ["1", "2"], 5,
           because="args.max_new_tokens is 7; the generator that is passed has seed 5")

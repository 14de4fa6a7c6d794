"""Exercise 11: the rewards of tokens, by hand, and a roll-out of stand-ins with simple numbers.

The log-prob of a response is the sum of its tokens' scores: -i for token i under the policy, -i/2 under pi_ref.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, judge_by, policy_like

import rlhf
from lm import LM

pytestmark = pytest.mark.exercise(n=11)
expect = partial(expect_, 11)
tensor = partial(torch.tensor, dtype=torch.float64)
Policy = policy_like(LM)

# at most 3 tokens: the first ends with its third, the second was cut, the third ends with its second
SAMPLES = {1: [[2, 4, EOS], [9, EOS]], 2: [[6, 8, 1], [9, EOS]], 3: [[5, EOS], [9, EOS]]}
REWARDS = {"1: 2 4": 10.0, "2: 6 8 1": 20.0, "3: 5": 30.0}
MASK = [[True, True, True], [True, True, True], [True, True, False]]


# ---- token_rewards


def token_rewards(final_rewards, logratios, mask, beta):
    return rlhf.token_rewards(tensor(final_rewards), tensor(logratios), torch.tensor(mask), beta)


def test_every_token_pays_for_its_log_ratio():
    expect([[-0.5, 1.0, -1.5]], token_rewards, [0.0], [[1.0, -2.0, 3.0]], [[True] * 3], 0.5)


def test_the_last_token_gets_the_final_reward_too():
    expect([[-0.5, 1.0, 8.5]], token_rewards, [10.0], [[1.0, -2.0, 3.0]], [[True] * 3], 0.5)


def test_a_shorter_response_has_its_last_token_earlier():
    expect([[-1.0, -1.0, 9.0], [19.0, 0.0, 0.0]], token_rewards, [10.0, 20.0], [[1.0] * 3] * 2,
           [[True] * 3, [True, False, False]], 1.0, because="one final reward a row; in padding there is none")


def test_what_stands_in_padding_counts_nothing():
    expect([[19.0, 0.0, 0.0]], token_rewards, [20.0], [[1.0, 70.0, -80.0]], [[True, False, False]], 1.0)


# ---- roll_out


def roll_out(beta=0.0, eos_penalty=0.0, seed=5):
    """(Rollout of prompts 1, 2 and 3, [Sampled])."""
    sampled, scores = [], torch.arange(12.0)
    policy = Policy("policy", (-scores).tolist(), SAMPLES, sampled)
    ref = Policy("ref", (-scores / 2).tolist(), {1: [[9, EOS]], 2: [[9, EOS]], 3: [[9, EOS]]}, sampled, trained=False)
    args = SimpleNamespace(max_new_tokens=3, beta=beta, eos_penalty=eos_penalty)
    generator = torch.Generator().manual_seed(seed)
    return rlhf.roll_out(policy, ref, ["1", "2", "3"], judge_by(REWARDS), generator, args), sampled


def rewards(beta, eos_penalty):
    return roll_out(beta, eos_penalty)[0].rewards


def test_prompts_and_responses_as_ids():
    def ids_and_mask():
        rolled = roll_out()[0]
        return rolled.prompts, rolled.responses, rolled.mask
    expect([[[1], [2], [3]], [[2, 4, EOS], [6, 8, 1], [5, EOS]], MASK], ids_and_mask)


def test_old_log_probs_are_the_policys_and_have_no_gradient():
    def old_logps_and_whether_with_gradient():
        old_logps = roll_out()[0].old_logps
        return old_logps, old_logps.requires_grad
    expect([[[-2.0, -4.0, 0.0], [-6.0, -8.0, -1.0], [-5.0, 0.0, 0.0]], False], old_logps_and_whether_with_gradient,
           because="token i has log-prob -i; they are numbers, to which later updates compare")


def test_the_judges_reward_comes_at_the_last_token():
    expect([[0.0, 0.0, 10.0], [0.0, 0.0, 20.0], [0.0, 30.0, 0.0]], rewards, 0.0, 0.0,
           because="the judge is asked with prompts and texts")


def test_the_kl_is_charged_at_every_token_and_once():
    expect([[0.5, 1.0, 10.0], [1.5, 2.0, 20.25], [1.25, 30.0, 0.0]], rewards, 0.5, 0.0,
           because="-beta times the log-ratios -1, -2, 0 and -3, -4, -0.5 and -2.5, 0")


def test_a_response_that_was_cut_loses_the_penalty():
    expect([[0.0, 0.0, 10.0], [0.0, 0.0, 13.0], [0.0, 30.0, 0.0]], rewards, 0.0, 7.0,
           because="the second response has no EOS; the first has it as its last possible token")


def test_rewards_have_no_gradient():
    def rewards_have_a_gradient():
        return roll_out(beta=0.5)[0].rewards.requires_grad
    expect(False, rewards_have_a_gradient)


def test_the_policy_writes_one_response_to_each_prompt():
    def who_samples_to_which_prompts_and_how(seed):
        return [list(each) for each in roll_out(seed=seed)[1]]
    expect([["policy", [[1], [2], [3]], 3, 1.0, 5]], who_samples_to_which_prompts_and_how, 5,
           because="at most args.max_new_tokens tokens, at temperature 1, from the generator given, here of seed 5")

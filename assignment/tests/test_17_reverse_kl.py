"""Exercise 17: the reverse KL of two models, on canned next-token distributions."""

import itertools
import math
from functools import partial

import pytest
import torch
from check import expect as expect_

import lm

pytestmark = pytest.mark.exercise(n=17)
expect = partial(expect_, 17)

# next-token probabilities at three positions of the response: of the policy, and of pi_ref
POLICY = [[3 / 4, 1 / 4], [1 / 2, 1 / 2], [3 / 4, 1 / 4]]
REF = [[1 / 2, 1 / 2], [3 / 4, 1 / 4], [1 / 4, 3 / 4]]
KL = [sum(p * math.log(p / q) for p, q in zip(*both)) for both in zip(POLICY, REF)]


class Canned(lm.LM):
    """A stand-in for a policy: its next-token distributions depend on the position alone."""

    def __init__(self, probabilities):
        torch.nn.Module.__init__(self)
        self.logits = torch.tensor(probabilities, dtype=torch.float64).log() + 5
        self.micro_batch, self.batch_size = None, 64

    def response_logits(self, prompts, responses):
        """What that of exercise 1 returns. Two models differ in padding, too."""
        T = max(map(len, responses))
        ids = torch.tensor([[*response, *[0] * (T - len(response))] for response in responses])
        mask = torch.tensor([[t < len(response) for t in range(T)] for response in responses])
        return self.logits[:T].expand(len(responses), T, 2), ids, mask


def reverse_kl(responses, policy=POLICY, ref=REF, batch_size=64):
    policy = Canned(policy)
    policy.batch_size = batch_size
    return policy.reverse_kl(Canned(ref), [[1]] * len(responses), responses)


def test_one_token_by_hand():
    expect([KL[0]], reverse_kl, [[0]], because="3/4 log 3/2 + 1/4 log 1/2; the other way round it is 0.1438")


def test_tokens_add_up():
    expect([sum(KL)], reverse_kl, [[0, 1, 0]])


def test_padding_counts_nothing():
    expect([KL[0], sum(KL), KL[0] + KL[1]], reverse_kl, [[0], [1, 1, 1], [1, 0]])


def test_the_sampled_token_does_not_matter_only_the_prefix():
    expect([KL[0], KL[0]], reverse_kl, [[0], [1]], because="the expectation over the vocabulary is exact")


def test_zero_for_equal_models():
    expect([0.0, 0.0], reverse_kl, [[0, 1], [1]], POLICY, POLICY)


def test_batches_of_any_size_give_the_same():
    for batch_size in (1, 2, 3):
        expect([KL[0], KL[0] + KL[1], sum(KL), KL[0], KL[0]], reverse_kl, [[0], [1, 1], [0, 0, 0], [1], [0]],
               batch_size=batch_size)


def test_its_mean_over_the_policys_samples_is_the_kl_of_the_sequences():
    def expected_estimate(policy, ref):
        responses = [list(y) for y in itertools.product((0, 1), repeat=3)]
        weight = [math.prod(policy[t][token] for t, token in enumerate(y)) for y in responses]
        return sum(w * kl for w, kl in zip(weight, reverse_kl(responses, policy, ref).tolist()))
    expect(sum(KL), expected_estimate, POLICY, REF)

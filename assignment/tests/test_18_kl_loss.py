"""Exercise 18: HyPO's KL term. What counts is its expected gradient, by enumerating every sample."""

import itertools
from functools import partial

import pytest
import torch
from check import expect as expect_

import hypo

pytestmark = pytest.mark.exercise(n=18)
expect = partial(expect_, 18)
tensor = partial(torch.tensor, dtype=torch.float64)

POLICY, REF = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
# grad of KL(pi || ref) by the logits: pi (log pi/ref - KL), KL = 0.5 log 2.5 + 0.3 log 1.5 + 0.2 log 1/3 = 0.3600626
GRADIENT = [0.2781140, 0.0136208, -0.2917349]


def expected_gradient(policy, ref, k):
    """The mean gradient by the policy's logits over all k-tuples of responses, weighed by their probability."""
    logits = policy.log().requires_grad_()
    total = torch.zeros_like(logits)
    for ys in itertools.product(range(len(policy)), repeat=k):
        logps = logits.log_softmax(-1)[list(ys)][None]  # (1, k)
        loss = hypo.kl_loss(logps, logps - ref.log()[list(ys)])  # (1,)
        gradient, = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        total += policy[list(ys)].prod() * gradient
    return total


def test_one_sample_has_the_gradient_of_the_reverse_kl():
    expect(GRADIENT, expected_gradient, tensor(POLICY), tensor(REF), 1,
           because="the gradient of KL(pi || pi_ref) by the logits: pi (h - KL)")


def test_so_have_two_samples():
    expect(GRADIENT, expected_gradient, tensor(POLICY), tensor(REF), 2)


def test_and_three():
    expect(GRADIENT, expected_gradient, tensor(POLICY), tensor(REF), 3)


def test_one_sample_is_line_5_as_printed():
    # -2 * 0.5 and -4 * -1
    expect([-1.0, 4.0], hypo.kl_loss, tensor([[-2.0], [-4.0]]), tensor([[0.5], [-1.0]]))


def test_three_samples_by_hand():
    expect([-4.0], hypo.kl_loss, tensor([[-1.0, -2.0, -4.0]]), tensor([[1.0, 2.0, 6.0]]),
           because="the weights are 1 - 4, 2 - 3.5 and 6 - 1.5; (-3 * -1 - 1.5 * -2 + 4.5 * -4) / 3")


def test_one_number_a_prompt_each_with_a_baseline_of_its_own():
    # weights -1, 1 and -2, 2
    expect([-1.0, -6.0], hypo.kl_loss, tensor([[-1.0, -3.0], [-2.0, -8.0]]), tensor([[0.0, 1.0], [50.0, 52.0]]))


def test_the_weight_is_a_number_and_the_log_prob_is_what_moves():
    def gradients_of_kl_loss(logps, logratios):
        inputs = logps.requires_grad_(), logratios.requires_grad_()
        found = torch.autograd.grad(hypo.kl_loss(*inputs).sum(), inputs, allow_unused=True)
        return [torch.zeros_like(logps) if gradient is None else gradient for gradient in found]
    expect([[[-0.5, 0.5]], [[0.0, 0.0]]], gradients_of_kl_loss, tensor([[-1.0, -3.0]]), tensor([[2.0, 3.0]]))

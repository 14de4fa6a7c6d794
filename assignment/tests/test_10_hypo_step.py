"""Exercise 10: how a step of HyPO is wired. Losses and models are stand-ins with simple numbers.

A stand-in's log-prob of a response is the sum of its tokens' scores: -token for the policy, -token/2 for pi_ref.
"""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_

import hypo
import lm
import run

pytestmark = pytest.mark.exercise(n=10)
expect = partial(expect_, 10)

EOS = 0
# of the policy log pi is -3, -4 and -5, -12; the log-ratios are -1.5, -2 and -2.5, -6
PAIRS = [dict(prompt=[1], chosen=[3, EOS], rejected=[4, EOS], ref_chosen=-1.5, ref_rejected=-2.0),
         dict(prompt=[2], chosen=[5, EOS], rejected=[6, 6, EOS], ref_chosen=-2.5, ref_rejected=-6.0),
         dict(prompt=[11], chosen=[11, EOS], rejected=[11, EOS], ref_chosen=-99.0, ref_rejected=99.0)]  # never drawn
SAMPLES = {1: [7, 8, 11], 2: [9, 10, 11]}  # first token of the first, second, ... sample to a prompt


class Model(torch.nn.Module):
    def __init__(self, scale, trained):
        super().__init__()
        self.score = torch.nn.Parameter(-scale * torch.arange(12.0), requires_grad=trained)
        self.device = torch.device("cpu")


def token_logps(model, prompts, responses):
    T = max(map(len, responses))
    mask = torch.tensor([[t < len(row) for t in range(T)] for row in responses])
    return model.score[torch.tensor([[*row, *[0] * (T - len(row))] for row in responses])] * mask, mask


def logps(model, prompts, responses):
    return torch.stack([model.score[response].sum() for response in responses])


def pair_logps(model, pairs):
    return tuple(logps(model, None, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))


def dpo_loss(chosen_logratio, rejected_logratio, beta):
    """Not the DPO loss. On the minibatch above 2.5 beta and 1.5 beta."""
    return beta * (rejected_logratio - 3 * chosen_logratio)


def kl_loss(logps, logratios):
    """Not HyPO's. First sample's logp + twice the second's ... - 10 log-ratios of the first sample."""
    return logps @ torch.arange(1.0, logps.shape[1] + 1) - 10 * logratios[:, 0].detach()


def train(monkeypatch, beta=0.5, lam=0.25, k=2, steps=1):
    """What hypo.train did: its samples (model, prompts, longest, eos, seed) and updates (loss, gradient, moved)."""
    policy, ref, samples, updates, asked = Model(1.0, True), Model(0.5, False), [], [], Counter()

    def sample(model, prompts, max_new_tokens, eos_id, generator, *_, **__):
        name = "policy" if model is policy else "ref"
        samples.append((name, [list(prompt) for prompt in prompts], max_new_tokens, eos_id, generator.initial_seed()))
        responses = []
        for last, in prompts:
            responses.append([SAMPLES[last][asked[last]], EOS])
            asked[last] += 1
        return responses

    def update(model, optimizer, loss, args, *_):
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        updates.append((loss.item(), torch.autograd.grad(loss, policy.score)[0].tolist(),
                        [name for name, model in (("policy", policy), ("ref", ref)) if any(
                            parameter is model.score for parameter in held)]))
        asked.clear()  # the next step's samples are numbered from 1 again
        return torch.tensor(1.0)

    for module, stand_ins in {lm: [token_logps, logps, pair_logps, sample], hypo: [dpo_loss, kl_loss],
                              run: [update]}.items():
        for stand_in in stand_ins:
            monkeypatch.setattr(module, stand_in.__name__, stand_in)
    monkeypatch.setattr(run, "minibatch", lambda rows, args, step: rows[:2])
    monkeypatch.setattr(run, "loop", lambda args, *_: ((t, {}) for t in range(1, args.steps + 1)))
    args = SimpleNamespace(beta=beta, lam=lam, k=k, steps=steps, lr=0.1, batch_size=2, max_new_tokens=5, seed=0,
                           device="cpu")
    hypo.train(policy, ref, SimpleNamespace(eos_token_id=EOS), PAIRS, lambda policy: {}, args)
    return samples, updates


def test_the_loss_of_a_step(monkeypatch):
    def loss_of_a_step(beta, lam, k):
        return train(monkeypatch, beta, lam, k)[1][0][0]
    # 0.5 (2.5 + 1.5)/2 = 1 for the pairs; samples 7, 8 and 9, 10: -7 - 16 + 35 = 12 and -9 - 20 + 45 = 16
    expect(1 + 0.25 * 14, loss_of_a_step, 0.5, 0.25, 2, because="mean of l_dpo + lam times mean of l_kl")


def test_its_gradient(monkeypatch):
    def gradient_by_the_scores_of_tokens(beta, lam, k):
        return train(monkeypatch, beta, lam, k)[1][0][1]
    expect([-0.25, 0, 0, -0.75, 0.25, -0.75, 0.5, 0.125, 0.25, 0.125, 0.25, 0], gradient_by_the_scores_of_tokens,
           0.5, 0.25, 2, because="through the log-probs of the pairs (tokens 3 to 6) and of the samples (7 to 10)")


def test_one_sample_a_prompt(monkeypatch):
    def loss_of_a_step(beta, lam, k):
        return train(monkeypatch, beta, lam, k)[1][0][0]
    expect(1 + 0.25 * 32, loss_of_a_step, 0.5, 0.25, 1, because="-7 + 35 = 28 and -9 + 45 = 36")


def test_with_lam_0_it_is_dpo_and_samples_nothing(monkeypatch):
    def loss_and_number_of_samplings(lam):
        samples, updates = train(monkeypatch, lam=lam)
        return updates[0][0], len(samples)
    expect([1.0, 0], loss_and_number_of_samplings, 0.0)


def test_the_policy_samples_k_times_to_each_prompt_of_the_minibatch(monkeypatch):
    def who_samples_to_which_prompts(k):
        samples, _ = train(monkeypatch, k=k)
        return sorted({who for who, *_ in samples}), sorted(prompt for _, prompts, *_ in samples for prompt in prompts)
    expect([["policy"], [[1], [1], [1], [2], [2], [2]]], who_samples_to_which_prompts, 3)


def test_samples_end_at_eos_or_at_the_limit(monkeypatch):
    def limit_and_eos(k):
        return train(monkeypatch, k=k)[0][0][2:4]
    expect([5, EOS], limit_and_eos, 2)


def test_the_optimizer_moves_the_policy_alone(monkeypatch):
    def whose_weights_the_optimizer_holds(steps):
        return train(monkeypatch, steps=steps)[1][0][2]
    expect(["policy"], whose_weights_the_optimizer_holds, 1)


def test_the_same_run_again_draws_the_same_samples(monkeypatch):
    def seeds_are_the_same_in_two_runs(steps):
        first, second = ([seed for *_, seed in train(monkeypatch, steps=steps)[0]] for _ in range(2))
        return first == second
    expect(True, seeds_are_the_same_in_two_runs, 3, because='run.generator(args, "online", t) depends on --seed and t')


def test_every_step_draws_fresh_samples_and_takes_one_update(monkeypatch):
    def different_seeds_and_updates(steps):
        samples, updates = train(monkeypatch, steps=steps)
        return min(steps, len({seed for *_, seed in samples})), len(updates)
    expect([3, 3], different_seeds_and_updates, 3, because="a generator of its own for each step")

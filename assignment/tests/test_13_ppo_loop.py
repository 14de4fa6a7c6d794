"""Exercise 13: how PPO's loop is wired. The roll-out, GAE, whitening, the objective and both networks are stand-ins.

Every response has two tokens. The policy and the value function have one weight a response, or a token; what the
tests look at is what reaches gae and the objective, and the gradient when the optimizer takes its step.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from check import expect as expect_
from standins import EOS, rounded, scorer_like, watch

import data
import rlhf
import run
from lm import Scorer

pytestmark = pytest.mark.exercise(n=13)
expect = partial(expect_, 13)
Sums = scorer_like(Scorer)

N = 6  # responses in a step, of as many prompts
PROMPTS = [str(i) for i in range(N + 1)]  # the last is in no minibatch
# response i is [1, EOS] to prompt [i + 1], and the weight of token i is i: the values are V = i + 1 and i + 2
VALUES = [[i + 1.0, i + 2.0] for i in range(N)]


class Policy(torch.nn.Module):
    """One weight a response."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(len(PROMPTS)))


def whiten(x, mask):
    """Not whitening."""
    return 10 * x


def train(monkeypatch, steps=1, epochs=1, minibatches=1, lr=0.0, max_grad_norm=1e6, seed=0):
    """What happened in rlhf.train_ppo, by name."""
    policy, ref, value = Policy(), Policy(), Sums([float(i) for i in range(len(PROMPTS) + 1)])
    seen = SimpleNamespace(roll_outs=[], gae=[], parts=[], made_from=[], evaluated=[])

    def roll_out(who, reference, prompts, judge, generator, args):
        seen.roll_outs.append([{policy: "policy", ref: "ref"}[who], {policy: "policy", ref: "ref"}[reference],
                               list(prompts), judge, generator.initial_seed()])
        n = len(prompts)
        return rlhf.Rollout([[i + 1] for i in range(n)], [[1, EOS]] * n, torch.ones(n, 2).bool(), torch.zeros(n, 2),
                            torch.tensor([[0.0, float(i)] for i in range(n)]), {})

    def gae(rewards, values, mask, gae_lambda):
        """Not GAE."""
        seen.gae.append([values.tolist(), values.requires_grad, gae_lambda])
        return rewards - values

    def ppo_objective(policy, value, rolled, old_values, advantages, returns, rows):
        """Not PPO's: the weight of each response times its advantages, and all values times their returns."""
        rows = [int(row) for row in rows]
        seen.parts.append(SimpleNamespace(
            rows=rows, old_values=old_values.tolist(), advantages=advantages.tolist(), returns=returns.tolist()))
        before = value.weight[[row + 1 for row in rows]]  # the value of the prompt; after token 1 its weight joins
        loss = (policy.weight[rows] * advantages[rows].sum(1)).sum() + (
            before * returns[rows].sum(1) + value.weight[1] * returns[rows, 1]).sum()
        return loss, {"loss": loss.detach(), "ratio_error": torch.zeros(())}

    def scorer(network, args):
        seen.made_from.append({policy: "policy", ref: "ref"}[network])
        return value

    seen.updates = watch(monkeypatch, run, policy=policy.weight, value=value.weight)
    for name, function in dict(roll_out=roll_out, gae=gae, whiten=whiten, ppo_objective=ppo_objective).items():
        monkeypatch.setattr(rlhf, name, function)
    monkeypatch.setattr(data, "scorer", scorer)
    args = SimpleNamespace(steps=steps, epochs=epochs, minibatches=minibatches, lr=lr, batch_size=N, seed=seed,
                           device="cpu", max_grad_norm=max_grad_norm, beta=0.1, eos_penalty=0.0, max_new_tokens=2)
    rlhf.train_ppo(policy, ref, PROMPTS, "the judge", lambda it: seen.evaluated.append(it is policy), args)
    return seen


def test_gae_gets_the_values_before_each_token_as_numbers(monkeypatch):
    def values_whether_with_gradient_and_lambda(steps):
        return train(monkeypatch, steps).gae
    expect([[VALUES, False, rlhf.GAE_LAMBDA]], values_whether_with_gradient_and_lambda, 1,
           because="before the first token the score is that of the prompt; the last score is after all")


def test_each_step_rolls_out_the_policy_once(monkeypatch):
    def who_with_which_reference_prompts_and_judge(steps, epochs):
        return [each[:4] for each in train(monkeypatch, steps, epochs).roll_outs]
    expect([["policy", "ref", PROMPTS[:N], "the judge"]] * 2, who_with_which_reference_prompts_and_judge, 2, 3,
           because="one minibatch of prompts a step, however many epochs are made of it")


def test_each_step_rolls_out_with_fresh_numbers(monkeypatch):
    def different_seeds(steps):
        return len({each[4] for each in train(monkeypatch, steps).roll_outs})
    expect(3, different_seeds, 3, because="a generator of its own for each step")


def test_the_value_function_starts_from_pi_ref(monkeypatch):
    def made_from():
        return train(monkeypatch).made_from
    expect(["ref"], made_from, because="data.scorer makes it")


def test_advantages_are_whitened_and_returns_are_not(monkeypatch):
    def old_values_advantages_and_returns_of_the_second_response(steps):
        part = train(monkeypatch, steps).parts[0]
        return part.old_values[1], part.advantages[1], part.returns[1]
    # rewards 0 and 1, values 2 and 3: this gae says -2 and -2, this whiten ten times that
    expect([[2.0, 3.0], [-20.0, -20.0], [0.0, 1.0]], old_values_advantages_and_returns_of_the_second_response, 1,
           because="V, whiten(gae), and gae + V; gae stands for rewards - V, whiten for 10 times")


def test_parts_are_of_one_size(monkeypatch):
    def sizes(epochs, minibatches):
        return sorted(len(part.rows) for part in train(monkeypatch, epochs=epochs, minibatches=minibatches).parts)
    expect([2] * 6, sizes, 2, 3, because="six responses in three parts, twice")
    expect([1, 1, 2, 2], sizes, 1, 4, because="six responses in four parts")


def test_every_epoch_uses_every_response_once_in_parts(monkeypatch):
    def rows_of_each_epoch(epochs, minibatches):
        rows = [part.rows for part in train(monkeypatch, epochs=epochs, minibatches=minibatches).parts]
        return [sorted(sum(rows[i:i + minibatches], [])) for i in range(0, len(rows), minibatches)]
    expect([[0, 1, 2, 3, 4, 5]] * 2, rows_of_each_epoch, 2, 3, because="the rows of each three updates, put in order")


def test_epochs_and_steps_have_orders_of_their_own(monkeypatch):
    def different_orders_up_to_5(steps, epochs):
        return min(5, len({tuple(part.rows) for part in train(monkeypatch, steps, epochs).parts}))
    expect(5, different_orders_up_to_5, 1, 6,
           because="the epochs of a step differ; of six among 720 orders, two may chance to be the same")
    expect(5, different_orders_up_to_5, 6, 1, because="so do the steps")


def test_the_same_run_again_has_the_same_orders(monkeypatch):
    def orders_are_the_same_in_two_runs(steps, epochs):
        first, second = ([part.rows for part in train(monkeypatch, steps, epochs).parts] for _ in range(2))
        return first == second
    expect(True, orders_are_the_same_in_two_runs, 2, 2, because="step.generator depends on --seed and the step")


def test_values_are_taken_before_the_first_update_of_a_step(monkeypatch):
    def old_values_of_each_part(epochs, minibatches, lr):
        return [part.old_values for part in train(monkeypatch, 1, epochs, minibatches, lr).parts]
    expect([VALUES] * 4, old_values_of_each_part, 2, 2, 0.01, because="later updates compare with what was")


def test_the_next_step_has_the_new_values(monkeypatch):
    def the_second_steps_values_are_the_firsts(steps, lr):
        first, second = (values for values, *_ in train(monkeypatch, steps, lr=lr).gae)
        return first == second
    expect(False, the_second_steps_values_are_the_firsts, 2, 0.01,
           because="the first step's update has moved the value function")


def test_each_part_is_an_update_with_its_own_gradient(monkeypatch):
    def responses_with_a_gradient_are_those_of_the_part(minibatches):
        seen = train(monkeypatch, minibatches=minibatches)
        return [[i for i, g in enumerate(update.gradient["policy"]) if g] == sorted(part.rows)
                for update, part in zip(seen.updates, seen.parts)] + [len(seen.updates)]
    expect([True, True, True, 3], responses_with_a_gradient_are_those_of_the_part, 3,
           because="of each update whether it has its part's responses alone; and the number of updates")


def test_the_gradient_of_an_update(monkeypatch):
    def gradients_by_the_weights_of_policy_and_value():
        gradient = train(monkeypatch).updates[0].gradient
        return gradient["policy"], gradient["value"]
    # advantages 10 (0 - V + i - V) = -10 (i + 3); returns are the rewards, 0 and i: V_1 knows prompt i + 1 and token 1
    expect([[-30, -40, -50, -60, -70, -80, 0], [0, 15, 1, 2, 3, 4, 5, 0]],
           gradients_by_the_weights_of_policy_and_value,
           because="of ppo_objective, which stands for the weight of a response times its advantages + V times returns")


def test_policy_and_value_function_are_clipped_apart(monkeypatch):
    def norms_of_the_gradients(max_grad_norm):
        gradient = train(monkeypatch, max_grad_norm=max_grad_norm).updates[0].gradient
        return [torch.tensor(gradient[name]).norm() for name in ("policy", "value")]
    expect([0.5, 0.5], norms_of_the_gradients, 0.5, within=1e-5, because="each has a norm of its own, before the step")


def test_learning_rates(monkeypatch):
    def rate_of_policy_and_value(lr):
        rate = train(monkeypatch, lr=lr).updates[0].rate
        return [rate.get("policy"), rate.get("value")]
    expect([0.01, 0.02], rate_of_policy_and_value, 0.01, because="one optimizer; the value function has twice lr")


def test_the_weights_go_down_and_do_not_decay(monkeypatch):
    def change_of_policy_and_value(lr):
        moved = train(monkeypatch, lr=lr).updates[0].moved
        return rounded(moved["policy"]), rounded(moved["value"])
    expect([[*[0.01] * N, 0], [0, *[-0.02] * 6, 0]], change_of_policy_and_value, 0.01, within=1e-5,
           because="AdamW's first step: the rate against the gradient's sign, and without a gradient none")


def test_what_is_evaluated_is_the_policy(monkeypatch):
    def evaluate_gets_the_policy():
        return train(monkeypatch).evaluated
    expect([True], evaluate_gets_the_policy, because="run.loop hands over what is trained, policy and value function")

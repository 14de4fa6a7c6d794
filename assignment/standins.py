"""Stand-ins for the tests of training loops: models whose weights are a few numbers, and a loop that is looked at.

The grader has them in memory before a submission runs, so they import nothing of it: a test passes what they need.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch

EOS = 0


class Sampled(NamedTuple):
    """One call of a policy's `sample`."""
    who: str
    prompts: list
    limit: int
    temperature: float
    seed: int


def policy_like(LM):
    """A class of policies, for lm.LM: each token has one log-prob, its score, whatever stands before it."""

    class Policy(LM):
        device = torch.device("cpu")

        def __init__(self, name, scores, samples=None, sampled=None, trained=True):
            """samples: last token of a prompt -> its first response, its second, ...; sampled: notes who draws."""
            torch.nn.Module.__init__(self)
            self.score = torch.nn.Parameter(torch.tensor(scores), requires_grad=trained)
            self.name, self.samples, self.sampled, self.asked = name, samples, sampled, Counter()
            self.eos_id, self.end_ids, self.batch_size, self.micro_batch = EOS, {EOS}, 64, None

        def token_logps(self, prompts, responses):
            ids, mask = padded(responses)
            return torch.where(mask, self.score[ids], 0.0), mask

        def logps(self, prompts, responses):
            return torch.stack([self.score[response].sum() for response in responses])

        def sample(self, prompts, max_new_tokens, generator, temperature=1.0):
            self.sampled.append(Sampled(self.name, [list(prompt) for prompt in prompts], max_new_tokens, temperature,
                                        generator.initial_seed()))
            responses = []
            for prompt in prompts:
                responses.append(self.samples[prompt[-1]][self.asked[prompt[-1]]])
                self.asked[prompt[-1]] += 1
            return responses

        def encode_prompt(self, prompt):
            return [int(prompt)]

        def decode(self, ids):
            return " ".join(str(token) for token in ids if token != EOS)

    return Policy


def scorer_like(Scorer):
    """A class of scorers, for lm.Scorer: a score is the sum of the weights of prompt and response so far."""

    class Sums(Scorer):
        device = torch.device("cpu")

        def __init__(self, weights):
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(torch.tensor(weights))
            self.batch_size, self.micro_batch = 64, None

        def scores(self, prompts, responses):
            ids, mask = padded(responses)
            first = torch.stack([self.weight[prompt].sum() for prompt in prompts])[:, None]  # (B, 1)
            after = first + self.weight[ids].cumsum(1)
            return torch.cat([first, torch.where(mask, after, 1000.0)], dim=1), mask  # in padding there is anything

    return Sums


def judge_by(rewards):
    """A judge that knows the rewards of "prompt: response", and complains of others."""
    def judge(prompts, texts):
        for prompt, text in zip(prompts, texts, strict=True):
            if f"{prompt}: {text}" not in rewards:
                raise LookupError(f"the judge is asked for the reward of the text {text!r} as a response to the prompt "
                                  f"{prompt!r}, and the policy has not written that")
        return [rewards[f"{prompt}: {text}"] for prompt, text in zip(prompts, texts)]
    return judge


def padded(responses):
    """(ids, mask), both (B, T)."""
    T = max(map(len, responses))
    return (torch.tensor([[*response, *[EOS] * (T - len(response))] for response in responses]),
            torch.tensor([[t < len(response) for t in range(T)] for response in responses]))


def rounded(numbers) -> list[float]:
    """To five digits, to be read."""
    return [round(number, 5) for number in numbers]


def growth(gradients) -> list[float]:
    """How large each gradient is, in units of the first."""
    norms = [math.hypot(*gradient) for gradient in gradients]
    return [norm / norms[0] if norms[0] else 0.0 for norm in norms]


class Update(NamedTuple):
    """One step of an optimizer; the dictionaries are by the names of the models."""
    step: int
    gradient: dict  # as it was when the step was taken
    moved: dict  # how far the weights have gone
    rate: dict  # the learning rates of the weights that the optimizer holds


def watch(monkeypatch, run, begin=lambda: None, **weights) -> list[Update]:
    """The updates that a loop will make. run.loop is replaced; a minibatch is the first args.batch_size rows.

    begin is called before each step. weights: name -> the one parameter of a model.
    """
    updates: list[Update] = []

    class Step(run.Step):
        def minibatch(self, rows):
            return list(rows[:self.args.batch_size])

    def loop(args, trained, optimizer, evaluate):
        rate = {name: group["lr"] for group in optimizer.param_groups for parameter in group["params"]
                for name, weight in weights.items() if weight is parameter}
        number = 0

        def before(*_):
            if all(weight.grad is None for weight in weights.values()):
                raise AssertionError("the optimizer takes a step, and no weight has a gradient")
            gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
            updates.append(Update(number, {name: gradient.tolist() for name, gradient in gradients.items()},
                                  {name: w.detach().clone() for name, w in weights.items()}, rate))

        def after(*_):
            was = updates[-1].moved
            updates[-1] = updates[-1]._replace(moved={name: (w - was[name]).tolist() for name, w in weights.items()})

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        evaluate(trained)
        for number in range(1, args.steps + 1):
            begin()
            yield Step(number, args)
        if not updates:
            raise AssertionError("the optimizer has taken no step in the whole run")

    monkeypatch.setattr(run, "loop", loop)
    return updates

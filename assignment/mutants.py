"""Proves the grader: plants one mistake at a time into the solution and sees whether the right exercise fails.

    python assignment/mutants.py [--jobs N]

Every mistake is a small edit of a function that students write, of the kind they make. For each one the tests of
all exercises run. The exercise that the function belongs to must fail, and no other. An edit whose old text is
no longer in the source, exactly once, is an error too. Exits with 1 if anything is not as it must be.
"""

import argparse
import sys
from typing import NamedTuple

from exercises import EXERCISES, PROJECT
from grade import CORES, number, run_all, run_command, submission, verdict

# (exercise, file, what the file says exactly once, {mistake: what it says instead})
PLANTED = [
    (1, "lm", "position_ids=positions[:, :-1],", {
        "position ids count the padding": ""}),
    (1, "lm", "attention_mask=attention_mask[:, :-1],", {
        "the padding is attended to": ""}),
    (1, "lm", "ids[:, :-1], attention_mask=attention_mask[:, :-1],\n"
              "                            position_ids=positions[:, :-1],", {
        "shifted by one: a token predicts itself": "ids, attention_mask=attention_mask, position_ids=positions,"}),
    (1, "lm", "T = mask.shape[1]\n", {
        "dropout is on: the network is put into train mode": "T = mask.shape[1]\n        self.model.train()\n"}),
    (1, "lm", "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))\n        return logits, ids", {
        "log-softmax in bfloat16": "return logits, ids"}),
    (1, "lm", "return logits, ids[:, -T:], mask", {
        "no gradient": "return logits.detach(), ids[:, -T:], mask",
        "the ids stand one column too early": "return logits, ids[:, -T - 1:-1], mask"}),
    (1, "lm", "return torch.where(mask, token_logits - logits.logsumexp(-1), 0.0), mask", {
        "the EOS is dropped: a mask from token ids":
            "mask = mask & (ids != 0)\n"
            "        return torch.where(mask, token_logits - logits.logsumexp(-1), 0.0), mask",
        "logits instead of log-probs": "return torch.where(mask, token_logits, 0.0), mask",
        "a loss in place of a log-prob": "return torch.where(mask, logits.logsumexp(-1) - token_logits, 0.0), mask",
        "probabilities instead of their logs":
            "return torch.where(mask, (token_logits - logits.logsumexp(-1)).exp(), 0.0), mask",
        "the normaliser has no gradient":
            "return torch.where(mask, token_logits - logits.detach().logsumexp(-1), 0.0), mask",
        "padding has log-probs": "return token_logits - logits.logsumexp(-1), mask"}),
    (1, "lm", "return self.token_logps(prompts, responses)[0].sum(1)", {
        "mean over tokens instead of sum": "return self.token_logps(prompts, responses)[0].mean(1)",
        "one number for the whole batch": "return self.token_logps(prompts, responses)[0].sum()"}),

    (2, "dpo", "-F.logsigmoid(beta * (chosen_logratio - rejected_logratio))", {
        "chosen and rejected swapped": "-F.logsigmoid(beta * (rejected_logratio - chosen_logratio))",
        "a loss that is to be maximised": "F.logsigmoid(beta * (chosen_logratio - rejected_logratio))",
        "beta outside the sigmoid": "-beta * F.logsigmoid(chosen_logratio - rejected_logratio)",
        "log of a sigmoid that underflows": "-torch.sigmoid(beta * (chosen_logratio - rejected_logratio)).log()",
        "mean over the pairs": "-F.logsigmoid(beta * (chosen_logratio - rejected_logratio)).mean()",
        "two responses judged apart":
            "-F.logsigmoid(beta * chosen_logratio) - F.logsigmoid(-beta * rejected_logratio)"}),
    (2, "coverage", "-torch.nn.functional.logsigmoid(beta * h)", {
        "no beta in the theory's copy": "-torch.nn.functional.logsigmoid(h)"}),

    (3, "dpo", "(chosen_logratio - rejected_logratio - 1 / (2 * beta)) ** 2", {
        "target beta/2, as on some slides": "(chosen_logratio - rejected_logratio - beta / 2) ** 2",
        "target 1/beta": "(chosen_logratio - rejected_logratio - 1 / beta) ** 2",
        "chosen and rejected swapped": "(rejected_logratio - chosen_logratio - 1 / (2 * beta)) ** 2",
        "beta on the margin": "(beta * (chosen_logratio - rejected_logratio) - 1 / 2) ** 2",
        "absolute error": "(chosen_logratio - rejected_logratio - 1 / (2 * beta)).abs()",
        "a margin beyond the target is free":
            "(chosen_logratio - rejected_logratio - 1 / (2 * beta)).clamp(max=0) ** 2"}),
    (3, "coverage", "(h - 1 / (2 * beta)).square()", {
        "target beta/2 in the theory's copy": "(h - beta / 2).square()"}),

    (4, "rlhf", "-F.logsigmoid(chosen_scores - rejected_scores)", {
        "chosen and rejected swapped": "-F.logsigmoid(rejected_scores - chosen_scores)",
        "a loss that is to be maximised": "F.logsigmoid(chosen_scores - rejected_scores)",
        "log of a sigmoid that underflows": "-torch.sigmoid(chosen_scores - rejected_scores).log()",
        "two responses judged apart": "-F.logsigmoid(chosen_scores) - F.logsigmoid(-rejected_scores)",
        "mean over the pairs": "-F.logsigmoid(chosen_scores - rejected_scores).mean()",
        "probability instead of its log": "-torch.sigmoid(chosen_scores - rejected_scores)"}),

    (5, "rlhf", "next_advantage = (delta + gae_lambda * next_advantage) * mask[:, t]", {
        "lambda forgotten": "next_advantage = (delta + next_advantage) * mask[:, t]",
        "rewards of padding are believed":
            "next_advantage = delta + gae_lambda * next_advantage * mask[:, t + 1] if t + 1 < mask.shape[1] else delta",
        "advantages leak out of padding": "next_advantage = delta + gae_lambda * next_advantage"}),
    (5, "rlhf", "next_value = values[:, t] * mask[:, t]", {
        "the value of padding is believed": "next_value = values[:, t]"}),
    (5, "rlhf", "delta = rewards[:, t] + next_value - values[:, t]", {
        "the next state's value is forgotten": "delta = rewards[:, t] - values[:, t]"}),
    (5, "rlhf", "for t in reversed(range(rewards.shape[1])):", {
        "forwards in time": "for t in range(rewards.shape[1]):"}),
    (5, "rlhf", "entries = x[mask]", {
        "whitening over padding": "entries = x"}),
    (5, "rlhf", "deviation = entries.std(unbiased=False)", {
        "the unbiased deviation": "deviation = entries.std()"}),
    (5, "rlhf", "varied = deviation > 1e-6 * entries.abs().max()", {
        "a constant becomes NaN": "varied = True",
        "a constant becomes its rounding error": "deviation, varied = deviation.clamp(min=1e-8), True"}),
    (5, "rlhf", "return torch.where(mask & varied, (x - entries.mean()) / deviation, 0.0)", {
        "padding is not 0 after whitening": "return torch.where(varied, (x - entries.mean()) / deviation, 0.0)",
        "a mean for each row": "mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)\n"
                               "    return torch.where(mask & varied, (x - mean) / deviation, 0.0)"}),

    (6, "rlhf", "ratio = torch.exp(logps - old_logps)\n    return", {
        "the ratio upside down": "ratio = torch.exp(old_logps - logps)\n    return",
        "a difference of log-probs for a ratio": "ratio = 1 + logps - old_logps\n    return"}),
    (6, "rlhf", "-torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)", {
        "the larger of the two products":
            "-torch.max(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
        "a loss that is to be maximised": "torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
        "clipped above only": "-torch.min(ratio * advantages, ratio.clamp(max=1 + clip) * advantages)",
        "clipped on the wrong side":
            "-torch.where(advantages > 0, ratio.clamp(min=1 - clip), ratio.clamp(max=1 + clip)) * advantages",
        "clipped without the minimum": "-ratio.clamp(1 - clip, 1 + clip) * advantages",
        "a clip of 0.2 whatever is asked": "-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)"}),

    (7, "rlhf", "return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)", {
        "the baseline includes the sample": "return rewards - rewards.mean(1, keepdim=True)",
        "divided by k": "return rewards - (rewards.sum(1, keepdim=True) - rewards) / k",
        "one baseline for the whole batch": "return rewards - (rewards.sum() - rewards) / (rewards.numel() - 1)",
        "sums over prompts": "return rewards - (rewards.sum(0, keepdim=True) - rewards) / (k - 1)",
        "the sign reversed": "return (rewards.sum(1, keepdim=True) - rewards) / (k - 1) - rewards"}),

    (8, "lm", "kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)", {
        "KL direction reversed": "kl = (log_ref.exp() * (log_ref - log_pi)).sum(-1)",
        "the expectation under pi_ref": "kl = (log_ref.exp() * (log_pi - log_ref)).sum(-1)",
        "the log-ratio of the sampled token": "ids = self.response_logits(*batch)[1]\n"
                                              "            kl = (log_pi - log_ref).gather(-1, ids[..., None])[..., 0]",
        "mean over the vocabulary": "kl = (log_pi.exp() * (log_pi - log_ref)).mean(-1)"}),
    (8, "lm", "torch.where(mask, kl, 0.0).sum(1)", {
        "mean over tokens instead of sum": "torch.where(mask, kl, 0.0).mean(1)",
        "padding counts": "kl.sum(1)"}),
    (8, "lm", "range(0, len(prompts), n), \"KL\"", {
        "the last, short batch is lost": "range(0, max(1, len(prompts) - n + 1), n), \"KL\""}),
    (8, "lm", "log_ref = ref.response_logits(*batch)[0]", {
        "the policy against itself": "log_ref = self.response_logits(*batch)[0]"}),

    (9, "hypo", "return (weights * logps).mean(1)", {
        "zero gradient: the sampled log-ratio is differentiated": "return logratios.mean(1)",
        "k3, whose gradient is the forward KL's": "return (torch.exp(-logratios) - 1 + logratios).mean(1)",
        "the log-prob is detached instead": "return (logratios * logps.detach()).mean(1)",
        "sum over samples instead of mean": "return (weights * logps).sum(1)"}),
    (9, "hypo", "weights = logratios.detach()", {
        "the weight is not detached": "weights = logratios",
        "the KL is maximised": "weights = -logratios.detach()"}),
    (9, "hypo", "weights = weights - (weights.sum(1, keepdim=True) - weights) / (k - 1)", {
        "the baseline includes the sample": "weights = weights - weights.mean(1, keepdim=True)",
        "one baseline for the whole batch": "weights = weights - (weights.sum() - weights) / (weights.numel() - 1)",
        "no baseline": "pass"}),
    (9, "hypo", "    if k > 1:\n", {
        "0/0 where there is one sample": "    if k >= 1:\n"}),

    (10, "hypo", "responses = policy.sample(prompts, args.max_new_tokens,", {
        "samples of pi_ref instead of the policy": "responses = ref.sample(prompts, args.max_new_tokens,",
        "samples of 24 tokens whatever is asked": "responses = policy.sample(prompts, 24,"}),
    (10, "hypo", 'step.generator("online"))', {
        "the same random numbers in every step": "torch.Generator().manual_seed(args.seed))",
        "other random numbers in every run": "torch.Generator().manual_seed(torch.Generator().seed()))",
        "samples at a low temperature, which are not the policy's": 'step.generator("online"), 0.7)'}),
    (10, "hypo", "batch = step.minibatch(pairs)", {
        "all pairs in place of a minibatch": "batch = pairs"}),
    (10, "hypo", "[pair.prompt for pair in batch for _ in range(args.k)]", {
        "one row of kl_loss mixes prompts": "[pair.prompt for pair in batch] * args.k"}),
    (10, "hypo", "        logps = policy.logps(prompts, responses)", {
        "offline responses instead of samples":
            "        responses = [pair.chosen for pair in batch for _ in range(args.k)]\n"
            "        logps = policy.logps(prompts, responses)",
        "the KL term has no gradient": "        logps = policy.logps(prompts, responses).detach()"}),
    (10, "hypo", "logratios = logps - ref.logps(prompts, responses)", {
        "the log-ratio upside down": "logratios = ref.logps(prompts, responses) - logps"}),
    (10, "hypo", "loss_kl = kl_loss(logps.view(-1, args.k), logratios.view(-1, args.k)).mean()", {
        "samples and prompts transposed":
            "loss_kl = kl_loss(logps.view(args.k, -1), logratios.view(args.k, -1)).mean()",
        "the KL term summed over prompts":
            "loss_kl = kl_loss(logps.view(-1, args.k), logratios.view(-1, args.k)).sum()",
        "a local score: each token weighed by its own log-ratio":
            "each, of_ref = (model.token_logps(prompts, responses)[0] for model in (policy, ref))\n"
            "        loss_kl = ((each - of_ref).detach() * each).sum(1).mean()"}),
    (10, "hypo", "loss = loss_dpo + args.lam * loss_kl", {
        "lam forgotten": "loss = loss_dpo + loss_kl",
        "the KL is rewarded": "loss = loss_dpo - args.lam * loss_kl"}),
    (10, "hypo", "dpo_loss(chosen_logratio, rejected_logratio, args.beta).mean()", {
        "chosen and rejected swapped": "dpo_loss(rejected_logratio, chosen_logratio, args.beta).mean()",
        "the DPO loss summed over pairs": "dpo_loss(chosen_logratio, rejected_logratio, args.beta).sum()"}),
    (10, "hypo", "chosen_logratio, rejected_logratio = policy.logratios(batch)", {
        "log-probs without the reference": "chosen_logratio, rejected_logratio = policy.pair_logps(batch)"}),
    (10, "hypo", "torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0,", {
        "the optimizer holds pi_ref's weights": "torch.optim.AdamW(ref.parameters(), lr=args.lr, weight_decay=0.0,",
        "the learning rate is not args.lr": "torch.optim.AdamW(policy.parameters(), weight_decay=0.0,",
        "weight decay moves what has no gradient": "torch.optim.AdamW(policy.parameters(), lr=args.lr,"}),
    (10, "hypo",
     "loss.backward()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n        optimizer.step()\n", {
        "a step before there is a gradient":
            "optimizer.step()\n        loss.backward()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n",
        "clipped after the step":
            "loss.backward()\n        optimizer.step()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n",
        "the gradient is not clipped": "loss.backward()\n        grad_norm = 0.0\n        optimizer.step()\n",
        "clipped to a norm of 1 whatever is asked":
            "loss.backward()\n        grad_norm = run.clip(policy, 1.0)\n        optimizer.step()\n",
        "the gradient is erased before the step":
            "loss.backward()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n"
            "        optimizer.zero_grad()\n        optimizer.step()\n",
        "ascent on a loss, as in the box":
            "(-loss).backward()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n        optimizer.step()\n",
        "the KL term is logged and not trained on":
            "loss_dpo.backward()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n"
            "        optimizer.step()\n",
        "no step is taken": "loss.backward()\n        grad_norm = run.clip(policy, args.max_grad_norm)\n"}),
    (10, "hypo", "        optimizer.zero_grad()\n", {
        "the gradients of all steps add up": ""}),

    (11, "coverage", "return mean(rho, pi, pi - other)", {
        "KL direction reversed": "return mean(rho, other, other - pi)",
        "KL with prompts weighed alike": "return inner(pi, pi - other).mean()"}),
    (11, "coverage", "return V(b, pi) - b.beta * kl(b.rho, pi, b.ref)", {
        "the KL is rewarded": "return V(b, pi) + b.beta * kl(b.rho, pi, b.ref)",
        "no beta before the KL": "return V(b, pi) - kl(b.rho, pi, b.ref)"}),
    (11, "coverage", "return mean(b.rho, pi, b.reward)", {
        "the value of pi_ref": "return mean(b.rho, b.ref, b.reward)"}),
    (11, "coverage", "return (ref + reward / beta).log_softmax(-1)", {
        "a tilt by reward times beta": "return (ref + reward * beta).log_softmax(-1)",
        "a tilt that forgets pi_ref": "return (reward / beta).log_softmax(-1)",
        "normalised over prompts": "return (ref + reward / beta).log_softmax(0)"}),
    (11, "coverage", "return (ref + reward / beta).logsumexp(-1)", {
        "Z without pi_ref": "return (reward / beta).logsumexp(-1)",
        "exp overflows": "return (ref.exp() * (reward / beta).exp()).sum(-1).log()"}),

    (12, "coverage", "radius = (eps_kl / rho)[:, None]", {
        "the radius is not divided by rho(x)": "radius = torch.full_like(rho, eps_kl)[:, None]"}),
    (12, "coverage", "covered = (ref > -INF) & (rho > 0)[:, None]", {
        "prompts that never come count": "covered = ref > -INF"}),
    (12, "coverage", "cost = a * middle + torch.special.xlog1py(1 - a, -(rise / (1 - p)).clamp(max=1))", {
        "the other responses' part of the KL is forgotten": "cost = a * middle",
        "KL direction reversed": "cost = -p * middle + (1 - p) * ((1 - p) / (1 - a)).log()"}),
    (12, "coverage", "return (ref + high - (ref if mu is None else mu))[covered].exp().max()", {
        "the ratio to pi_ref, not to mu": "return high[covered].exp().max()"}),
    (12, "coverage", "return global_coverage(rho, ref if mu is None else mu)", {
        "an infinite radius forgets mu": "return global_coverage(rho, ref)"}),
    (12, "coverage", "return (-mu[rho > 0]).exp().max()", {
        "global coverage of prompts that never come": "return (-mu).exp().max()",
        "the commonest response": "return (-mu[rho > 0]).exp().min()"}),

    (13, "coverage", "torch.log1p(-mass) + pi.masked_fill(~seen, -INF).log_softmax(-1)", {
        "seen responses keep all their mass": "pi.masked_fill(~seen, -INF).log_softmax(-1)",
        "pi is not conditioned on the seen": "torch.log1p(-mass) + pi",
        "the seen responses become alike":
            "torch.log1p(-mass) + torch.zeros_like(pi).masked_fill(~seen, -INF).log_softmax(-1)"}),
    (13, "coverage", "(mass / (~seen).sum(-1, keepdim=True)).log()", {
        "every unseen response gets m": "mass.log().expand_as(pi)",
        "unseen responses of all prompts share m": "(mass / (~seen).sum()).log()"}),
    (13, "coverage", "return torch.where(seen, q - inner(q, q - b.ref)[:, None], b.ref).log_softmax(-1)", {
        "the sign of K": "return torch.where(seen, q + inner(q, q - b.ref)[:, None], b.ref).log_softmax(-1)",
        "K forgotten": "return torch.where(seen, q, b.ref).log_softmax(-1)",
        "unseen responses alike":
            "return torch.where(seen, q - inner(q, q - b.ref)[:, None], torch.zeros_like(q)).log_softmax(-1)"}),

    (14, "eval", "wins = sum(0.5 * (a == b) + (a > b) for", {
        "a tie is lost": "wins = sum((a > b) for",
        "a tie is won": "wins = sum((a >= b) for",
        "ties are left out of n": "n = sum(a != b for a, b in zip(rewards, opponent_rewards)) or 1\n"
                                  "    wins = sum((a > b) for",
        "losses are counted": "wins = sum(0.5 * (a == b) + (a < b) for"}),
    (14, "eval", "return wins / n, wilson_interval(wins, n)", {
        "the interval of the rate, not of the wins": "return wins / n, wilson_interval(wins / n, n)"}),
    (14, "eval", "half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n + z * z / 4)", {
        "the plain interval rate +- z sd": "half = z * math.sqrt(wins * (n - wins) / n) / n",
        "z^2/4 forgotten": "half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n)",
        "z is 1.96 whatever is asked": "half = 1.96 / (n + 1.96**2) * math.sqrt(wins * (n - wins) / n + 1.96**2 / 4)"}),
    (14, "eval", "center = (wins + z * z / 2) / (n + z * z)", {
        "the centre is not drawn to 1/2": "center = wins / n"}),
]


class Mutant(NamedTuple):
    exercise: int
    module: str
    old: str
    mistake: str
    new: str


MUTANTS = [Mutant(exercise, module, old, mistake, new)
           for exercise, module, old, mistakes in PLANTED for mistake, new in mistakes.items()]


def plant(mutant: Mutant) -> dict[str, bytes]:
    """The project's files with the mistake in them; ValueError if its old text is not there exactly once."""
    files, name = submission(PROJECT), f"{mutant.module}.py"
    source = files[name].decode()
    if source.count(mutant.old) != 1:
        raise ValueError(f"exercise {mutant.exercise}, {mutant.mistake}: {name} has its old text "
                         f"{source.count(mutant.old)} times and must have it once; mend mutants.py")
    return files | {name: source.replace(mutant.old, mutant.new).encode()}


def caught(mutant: Mutant, verdicts: list[dict]) -> bool:
    """Did the tests of its exercise fail, one by one and not by a crash, and those of no other?"""
    failed = [row for row in verdicts if not row["points"]]
    return [row["number"] for row in failed] == [mutant.exercise] and not failed[0]["problem"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = number(int, 1, 1000)
    parser.add_argument("--jobs", type=whole, default=CORES, help="at a time (default: one for each core)")
    parser.add_argument("--every", type=whole, default=1, help="only each N-th mistake (default 1: all)")
    args = parser.parse_args(argv)
    planted = MUTANTS[::args.every]
    try:
        files = [plant(mutant) for mutant in planted]
    except ValueError as error:
        sys.exit(f"error: {error}")
    # all exercises' tests on one mistake share a process
    outcomes = run_all([(given, EXERCISES) for given in files], 120.0, args.jobs)
    results = [[verdict(exercise, outcome) for exercise in EXERCISES] for outcome in outcomes]
    print(f"exercise  file         {'planted mistake':56}  caught by")
    for mutant, verdicts in zip(planted, results):
        own = verdicts[mutant.exercise - 1]
        how = f"{len(own['failures'])} of {own['tests']} tests" if caught(mutant, verdicts) else (
            f"WRONG: failed {[row['number'] for row in verdicts if not row['points']]}, {own['problem']}")
        print(f"{mutant.exercise:8}  {mutant.module + '.py':11}  {mutant.mistake:56}  {how}")
    wrong = sum(not caught(mutant, verdicts) for mutant, verdicts in zip(planted, results))
    print(f"{len(planted)} planted mistakes, {len(planted) - wrong} caught by the right exercise and by no other")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run_command(main)

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

UPDATE = """loss.backward()
        grad_norm = run.clip({0}, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
"""


def of_update(model: str) -> dict[str, str]:
    """Mistakes in the update that ends a loop's step."""
    update = UPDATE.format(model)
    clip, step, zero = (f"        {line}\n" for line in (
        f"grad_norm = run.clip({model}, args.max_grad_norm)", "optimizer.step()", "optimizer.zero_grad()"))
    return {
        "ascent on the loss": update.replace("loss.backward", "(-loss).backward"),
        "clipped after the step": update.replace(clip + step, step + clip),
        "the gradient is not clipped": update.replace(clip, "        grad_norm = 0.0\n"),
        "clipped to a norm of 1 whatever is asked": update.replace("args.max_grad_norm", "1.0"),
        "the gradient is erased before the step": update.replace(step + zero, zero + step),
        "the gradients of all steps add up": update.replace(zero, ""),
        "no step is taken": update.replace(step, "")}


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

    (2, "lm", "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)", {
        "softmax in bfloat16": "pass"}),
    (2, "lm", "cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=uniform.dtype)", {
        "the temperature is ignored": "cdf = logits.softmax(-1).cumsum(-1, dtype=uniform.dtype)",
        "logits times the temperature": "cdf = (logits * temperature).softmax(-1).cumsum(-1, dtype=uniform.dtype)",
        "probabilities divided by the temperature":
            "cdf = (logits.softmax(-1) / temperature).cumsum(-1, dtype=uniform.dtype)",
        "logits for probabilities": "cdf = (logits / temperature).cumsum(-1, dtype=uniform.dtype)",
        "probabilities that do not add up": "cdf = (logits / temperature).softmax(-1).to(uniform.dtype)",
        "probabilities added up in float32": "cdf = (logits / temperature).softmax(-1).float().cumsum(-1).double()",
        "softmax over the rows": "cdf = (logits / temperature).softmax(0).cumsum(-1, dtype=uniform.dtype)"}),
    (2, "lm", "if not total.isfinite().all():", {
        "NaN draws a token that is not there": "if False:"}),
    (2, "lm", "return torch.searchsorted(cdf, (1 - uniform)[:, None] * total).squeeze(1)", {
        "the first token comes at 0, whatever its probability":
            "return torch.searchsorted(cdf, uniform[:, None] * total).squeeze(1)",
        "the likeliest token": "return logits.argmax(-1)",
        "random numbers of its own":
            "return torch.multinomial(logits.div(temperature).softmax(-1), 1).squeeze(1)",
        "one number for all rows": "return torch.searchsorted(cdf, (1 - uniform)[:1, None] * total).squeeze(1)"}),
    (2, "lm", 'ids, mask = pad(prompts, "left", self.device)  # (B, P)\n        positions', {
        "prompts are padded on the right":
            'ids, mask = pad(prompts, "right", self.device)\n        positions'}),
    (2, "lm", "positions = (mask.cumsum(1) - 1).clamp(min=0)", {
        "positions count the padding": "positions = torch.arange(mask.shape[1], device=self.device).expand_as(mask)"}),
    (2, "lm", "while len(tokens) < uniform.shape[1] and alive.any():", {
        "all stop with the first that ends": "while len(tokens) < uniform.shape[1] and alive.all():",
        "nobody stops before the limit": "while len(tokens) < uniform.shape[1]:",
        "one token too many": "while len(tokens) <= uniform.shape[1] and alive.any():"}),
    (2, "lm", "mask[:, -ids.shape[1]:] if new_only else mask", {
        "the padding is attended to": "torch.ones_like(mask)"}),
    (2, "lm", "**{self.cache_name: cache}).logits[:, -1]  # (B, V)", {
        "the new tokens do not see the old": "**{self.cache_name: None}).logits[:, -1]"}),
    (2, "lm", "ids = draw(logits, uniform[:, len(tokens)], temperature)[:, None]", {
        "the same number for each token": "ids = draw(logits, uniform[:, 0], temperature)[:, None]",
        "one number for all rows of a step": "ids = draw(logits, uniform[0, len(tokens)].expand(len(ids)), "
                                             "temperature)[:, None]",
        "the temperature is not passed on": "ids = draw(logits, uniform[:, len(tokens)])[:, None]",
        "greedy decoding": "ids = logits.argmax(-1, keepdim=True)"}),
    (2, "lm", "alive &= ~torch.isin(ids.squeeze(1), self.ends)", {
        "one end token of several": "alive &= ids.squeeze(1) != self.eos_id",
        "a row that has ended lives again": "alive = ~torch.isin(ids.squeeze(1), self.ends)"}),
    (2, "lm", "torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1", {
        "positions stand still": "torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:]",
        "the last prompt token's position is the batch's":
            "torch.cat([mask, torch.ones_like(ids)], dim=1), torch.full_like(ids, mask.shape[1])",
        "the new token is not attended to": "torch.cat([mask, torch.zeros_like(ids)], dim=1), positions[:, -1:] + 1"}),
    (2, "lm", "return torch.cat(tokens, dim=1).tolist()", {
        "rows and columns exchanged": "return torch.cat(tokens, dim=1).T.tolist()"}),

    (3, "dpo", "-F.logsigmoid(beta * (chosen_logratio - rejected_logratio))", {
        "chosen and rejected swapped": "-F.logsigmoid(beta * (rejected_logratio - chosen_logratio))",
        "a loss that is to be maximised": "F.logsigmoid(beta * (chosen_logratio - rejected_logratio))",
        "beta outside the sigmoid": "-beta * F.logsigmoid(chosen_logratio - rejected_logratio)",
        "log of a sigmoid that underflows": "-torch.sigmoid(beta * (chosen_logratio - rejected_logratio)).log()",
        "mean over the pairs": "-F.logsigmoid(beta * (chosen_logratio - rejected_logratio)).mean()",
        "two responses judged apart":
            "-F.logsigmoid(beta * chosen_logratio) - F.logsigmoid(-beta * rejected_logratio)"}),
    (3, "coverage", "-torch.nn.functional.logsigmoid(beta * h)", {
        "no beta in the theory's copy": "-torch.nn.functional.logsigmoid(h)"}),

    (4, "dpo", "(chosen_logratio - rejected_logratio - 1 / (2 * beta)) ** 2", {
        "target beta/2, as on some slides": "(chosen_logratio - rejected_logratio - beta / 2) ** 2",
        "target 1/beta": "(chosen_logratio - rejected_logratio - 1 / beta) ** 2",
        "chosen and rejected swapped": "(rejected_logratio - chosen_logratio - 1 / (2 * beta)) ** 2",
        "beta on the margin": "(beta * (chosen_logratio - rejected_logratio) - 1 / 2) ** 2",
        "absolute error": "(chosen_logratio - rejected_logratio - 1 / (2 * beta)).abs()",
        "a margin beyond the target is free":
            "(chosen_logratio - rejected_logratio - 1 / (2 * beta)).clamp(max=0) ** 2"}),
    (4, "coverage", "(h - 1 / (2 * beta)).square()", {
        "target beta/2 in the theory's copy": "(h - beta / 2).square()"}),

    (5, "rlhf", "-F.logsigmoid(chosen_scores - rejected_scores)", {
        "chosen and rejected swapped": "-F.logsigmoid(rejected_scores - chosen_scores)",
        "a loss that is to be maximised": "F.logsigmoid(chosen_scores - rejected_scores)",
        "log of a sigmoid that underflows": "-torch.sigmoid(chosen_scores - rejected_scores).log()",
        "two responses judged apart": "-F.logsigmoid(chosen_scores) - F.logsigmoid(-rejected_scores)",
        "mean over the pairs": "-F.logsigmoid(chosen_scores - rejected_scores).mean()",
        "probability instead of its log": "-torch.sigmoid(chosen_scores - rejected_scores)"}),

    (6, "rlhf", "scorer.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)", {
        "no weight decay": "scorer.parameters(), lr=args.lr, weight_decay=0.0, fused=True)",
        "AdamW's own weight decay": "scorer.parameters(), lr=args.lr, fused=True)",
        "the learning rate is not args.lr": "scorer.parameters(), weight_decay=WEIGHT_DECAY, fused=True)"}),
    (6, "rlhf", "        batch = step.minibatch(pairs)\n", {
        "all pairs in place of a minibatch": "        batch = pairs\n"}),
    (6, "rlhf", "responses = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]\n        scores", {
        "chosen and rejected swapped":
            "responses = [pair.rejected for pair in batch] + [pair.chosen for pair in batch]\n        scores",
        "chosen and rejected interleaved, then cut in half":
            "responses = [y for pair in batch for y in (pair.chosen, pair.rejected)]\n        scores"}),
    (6, "rlhf", "scores = scorer.final_scores([pair.prompt for pair in batch] * 2, responses)", {
        "responses without their prompts": "scores = scorer.final_scores([[0]] * len(responses), responses)",
        "prompts and responses in another order":
            "scores = scorer.final_scores([pair.prompt for pair in batch for _ in range(2)], responses)",
        "the score at the batch's last column":
            "scores = scorer.scores([pair.prompt for pair in batch] * 2, responses)[0][:, -1]",
        "the score after the prompt":
            "scores = scorer.scores([pair.prompt for pair in batch] * 2, responses)[0][:, 0]",
        "scores without a gradient": "scores = scorer.predict([pair.prompt for pair in batch] * 2, responses)"
                                     ".requires_grad_()"}),
    (6, "rlhf", "loss = reward_loss(chosen_scores, rejected_scores).mean()", {
        "the loss summed over pairs": "loss = reward_loss(chosen_scores, rejected_scores).sum()",
        "the loss of the other order": "loss = reward_loss(rejected_scores, chosen_scores).mean()"}),
    (6, "rlhf", UPDATE.format("scorer"), of_update("scorer")),

    (7, "dpo", "torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0,", {
        "weight decay": "torch.optim.AdamW(policy.parameters(), lr=args.lr,",
        "the learning rate is not args.lr": "torch.optim.AdamW(policy.parameters(), weight_decay=0.0,"}),
    (7, "dpo", "        batch = pairs_of(step)\n", {
        "the first step's pairs for ever":
            "        batch = first = pairs_of(step) if step.number == 1 else first\n"}),
    (7, "dpo", "step.log(pairs=0)\n            continue", {
        "training ends with a step of ties": "step.log(pairs=0)\n            return"}),
    (7, "dpo", "        if not batch:", {
        "a step of ties crashes": "        if False:"}),
    (7, "dpo", "chosen_logratio, rejected_logratio = policy.logratios(batch)", {
        "chosen and rejected swapped": "rejected_logratio, chosen_logratio = policy.logratios(batch)",
        "log-probs without the reference": "chosen_logratio, rejected_logratio = policy.pair_logps(batch)"}),
    (7, "dpo", "        if args.length_average:\n", {
        "log-ratios are always divided by the length": "        if True:\n",
        "log-ratios are never divided by the length": "        if False:\n"}),
    (7, "dpo", "h_chosen = h_chosen / numbers([len(pair.chosen) for pair in batch])", {
        "divided by the length of prompt and response":
            "h_chosen = h_chosen / numbers([len(pair.prompt + pair.chosen) for pair in batch])",
        "the EOS is not counted": "h_chosen = h_chosen / numbers([len(pair.chosen) - 1 for pair in batch])"}),
    (7, "dpo", "h_rejected = h_rejected / numbers([len(pair.rejected) for pair in batch])", {
        "divided by the other response's length":
            "h_rejected = h_rejected / numbers([len(pair.chosen) for pair in batch])"}),
    (7, "dpo", "loss = dpo_loss(h_chosen, h_rejected, args.beta).mean()", {
        "the DPO loss summed over pairs": "loss = dpo_loss(h_chosen, h_rejected, args.beta).sum()",
        "beta is 0.1 whatever is asked": "loss = dpo_loss(h_chosen, h_rejected, 0.1).mean()",
        "the loss of the mean log-ratios": "loss = dpo_loss(h_chosen.mean(), h_rejected.mean(), args.beta)"}),
    (7, "dpo", "loss = ipo_loss(h_chosen, h_rejected, args.beta).mean()", {
        "DPO's loss for IPO": "loss = dpo_loss(h_chosen, h_rejected, args.beta).mean()",
        "the IPO loss of the other order": "loss = ipo_loss(h_rejected, h_chosen, args.beta).mean()"}),
    (7, "dpo", "loss = bo2_loss(h_chosen + numbers([pair.ref_chosen for pair in batch])).mean()", {
        "Best-of-2 on log-ratios": "loss = bo2_loss(h_chosen).mean()",
        "Best-of-2 on the loser": "loss = bo2_loss(policy.pair_logps(batch)[1]).mean()",
        "log pi_ref taken off twice":
            "loss = bo2_loss(h_chosen - numbers([pair.ref_chosen for pair in batch])).mean()"}),
    (7, "dpo", UPDATE.format("policy"), of_update("policy")),

    (8, "dpo", "start.policy.respond(prompts * 2, args.max_new_tokens, generator)", {
        "samples of pi_ref": "start.ref.respond(prompts * 2, args.max_new_tokens, generator)",
        "samples of 24 tokens whatever is asked": "start.policy.respond(prompts * 2, 24, generator)",
        "other random numbers": "start.policy.respond(prompts * 2, args.max_new_tokens, torch.Generator())",
        "responses to one prompt are neighbours":
            "start.policy.respond([x for x in prompts for _ in range(2)], args.max_new_tokens, generator)"}),
    (8, "dpo", "rewards = start.label(prompts * 2, texts)", {
        "labels by the judge that measures": "rewards = start.outcome(prompts * 2, texts)",
        "a response is judged under another prompt": "rewards = start.label(prompts[::-1] * 2, texts)"}),
    (8, "dpo", "for i, j in zip(range(n), range(n, 2 * n)):", {
        "neighbours are compared": "for i, j in zip(range(0, 2 * n, 2), range(1, 2 * n, 2)):",
        "responses to different prompts are compared": "for i, j in zip(range(n), reversed(range(n, 2 * n))):",
        "each pair comes twice": "for i, j in zip([*range(n)] * 2, [*range(n, 2 * n)] * 2):"}),
    (8, "dpo", "        if rewards[i] != rewards[j]:\n", {
        "ties are kept": "        if True:\n"}),
    (8, "dpo", "(i, j) if rewards[i] > rewards[j] else (j, i)", {
        "the worse response is chosen": "(i, j) if rewards[i] < rewards[j] else (j, i)",
        "the first response is chosen": "(i, j)"}),
    (8, "dpo", "data.Encoded(prompt_ids[i], ids[winner], ids[loser])", {
        "the EOS is lost": "data.Encoded(prompt_ids[i], [y for y in ids[winner] if y], [y for y in ids[loser] if y])"}),
    (8, "dpo", "return data.add_ref_logps(start.ref, pairs)", {
        "log pi_ref is missing": "return pairs",
        "log pi of the policy for log pi_ref": "return data.add_ref_logps(start.policy, pairs)"}),

    (9, "rlhf", "next_advantage = (delta + gae_lambda * next_advantage) * mask[:, t]", {
        "lambda forgotten": "next_advantage = (delta + next_advantage) * mask[:, t]",
        "rewards of padding are believed":
            "next_advantage = delta + gae_lambda * next_advantage * mask[:, t + 1] if t + 1 < mask.shape[1] else delta",
        "advantages leak out of padding": "next_advantage = delta + gae_lambda * next_advantage"}),
    (9, "rlhf", "next_value = values[:, t] * mask[:, t]", {
        "the value of padding is believed": "next_value = values[:, t]"}),
    (9, "rlhf", "delta = rewards[:, t] + next_value - values[:, t]", {
        "the next state's value is forgotten": "delta = rewards[:, t] - values[:, t]"}),
    (9, "rlhf", "for t in reversed(range(rewards.shape[1])):", {
        "forwards in time": "for t in range(rewards.shape[1]):"}),
    (9, "rlhf", "entries = x[mask]", {
        "whitening over padding": "entries = x"}),
    (9, "rlhf", "deviation = entries.std(unbiased=False)", {
        "the unbiased deviation": "deviation = entries.std()"}),
    (9, "rlhf", "varied = deviation > 1e-6 * entries.abs().max()", {
        "a constant becomes NaN": "varied = True"}),
    (9, "rlhf", "return torch.where(mask & varied, (x - entries.mean()) / deviation, 0.0)", {
        "padding is not 0 after whitening": "return torch.where(varied, (x - entries.mean()) / deviation, 0.0)",
        "a mean for each row": "mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)\n"
                               "    return torch.where(mask & varied, (x - mean) / deviation, 0.0)"}),

    (10, "rlhf", "ratio = torch.exp(logps - old_logps)\n    return", {
        "the ratio upside down": "ratio = torch.exp(old_logps - logps)\n    return",
        "a difference of log-probs for a ratio": "ratio = 1 + logps - old_logps\n    return"}),
    (10, "rlhf", "-torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)", {
        "the larger of the two products":
            "-torch.max(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
        "a loss that is to be maximised": "torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
        "clipped above only": "-torch.min(ratio * advantages, ratio.clamp(max=1 + clip) * advantages)",
        "clipped on the wrong side":
            "-torch.where(advantages > 0, ratio.clamp(min=1 - clip), ratio.clamp(max=1 + clip)) * advantages",
        "clipped without the minimum": "-ratio.clamp(1 - clip, 1 + clip) * advantages",
        "a clip of 0.2 whatever is asked": "-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)"}),

    (11, "rlhf", "rewards = -beta * logratios * mask", {
        "the KL is paid, not charged": "rewards = beta * logratios * mask",
        "beta forgotten": "rewards = -logratios * mask",
        "padding is charged": "rewards = -beta * logratios",
        "the KL of the last token is forgotten":
            "rewards = -beta * logratios * mask\n    rewards[torch.arange(len(rewards)), mask.sum(1) - 1] = 0"}),
    (11, "rlhf", "rewards[torch.arange(len(rewards)), mask.sum(1) - 1] += final_rewards", {
        "the final reward in the batch's last column": "rewards[:, -1] += final_rewards",
        "the final reward one token late":
            "rewards = F.pad(rewards, (0, 1))\n    rewards[torch.arange(len(rewards)), mask.sum(1)] += final_rewards\n"
            "    rewards = rewards[:, :-1]",
        "the final reward at every token": "rewards += final_rewards[:, None] * mask",
        "every row gets all final rewards": "rewards[:, mask.sum(1) - 1] += final_rewards"}),
    (11, "rlhf", "policy.respond(prompts, args.max_new_tokens, generator)", {
        "samples of pi_ref": "ref.respond(prompts, args.max_new_tokens, generator)",
        "samples of 24 tokens whatever is asked": "policy.respond(prompts, 24, generator)",
        "other random numbers in every run":
            "policy.respond(prompts, args.max_new_tokens, torch.Generator().manual_seed(torch.Generator().seed()))"}),
    (11, "rlhf", "judged = torch.tensor(judge(prompts, texts))", {
        "the judge is given ids": "judged = torch.tensor(judge(prompt_ids, responses))"}),
    (11, "rlhf", "torch.tensor([not policy.ended(ids) for ids in responses]).float()", {
        "the penalty for responses that have ended":
            "torch.tensor([policy.ended(ids) for ids in responses]).float()",
        "the penalty for shorter responses":
            "torch.tensor([len(ids) < args.max_new_tokens for ids in responses]).float()",
        "the penalty for responses as long as the limit":
            "torch.tensor([len(ids) == args.max_new_tokens for ids in responses]).float()"}),
    (11, "rlhf", "(judged - args.eos_penalty * unfinished)", {
        "the penalty is missing": "judged",
        "the penalty is a bonus": "(judged + args.eos_penalty * unfinished)",
        "a penalty of 1 whatever is asked": "(judged - unfinished)"}),
    (11, "rlhf", "    with torch.no_grad():  # by the update's own forward pass, so that the first ratio is 1\n", {
        "old log-probs have a gradient": "    with torch.enable_grad():\n"}),
    (11, "rlhf", "logratios = old_logps - ref.token_logps(prompt_ids, responses)[0]", {
        "the log-ratio upside down": "logratios = ref.token_logps(prompt_ids, responses)[0] - old_logps",
        "log-probs without the reference": "logratios = old_logps"}),
    (11, "rlhf", "rewards = token_rewards(finals, logratios, mask, args.beta)", {
        "the KL charged twice":
            "rewards = token_rewards(finals - args.beta * logratios.sum(1), logratios, mask, args.beta)",
        "the KL not charged": "rewards = token_rewards(finals, 0 * logratios, mask, args.beta)"}),
    (11, "rlhf", "return Rollout(prompt_ids, responses, mask, old_logps, rewards, metrics)", {
        "pi_ref's log-probs for the old policy's":
            "return Rollout(prompt_ids, responses, mask, old_logps - logratios, rewards, metrics)"}),

    (12, "rlhf", "clipped = old_values + (values - old_values).clamp(-clip, clip)", {
        "values clipped around 0": "clipped = values.clamp(-clip, clip)",
        "values clipped around the returns": "clipped = returns + (values - returns).clamp(-clip, clip)",
        "the ratio of values is clipped": "clipped = old_values * (values / old_values).clamp(1 - clip, 1 + clip)"}),
    (12, "rlhf", "return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)", {
        "the smaller of both errors": "return 0.5 * torch.min((values - returns) ** 2, (clipped - returns) ** 2)",
        "no half": "return torch.max((values - returns) ** 2, (clipped - returns) ** 2)",
        "no clip": "return 0.5 * (values - returns) ** 2",
        "absolute error": "return torch.max((values - returns).abs(), (clipped - returns).abs())"}),
    (12, "rlhf", "prompts, responses = [rolled.prompts[i] for i in rows], [rolled.responses[i] for i in rows]", {
        "all responses in place of a part": "rows = torch.arange(len(rolled.prompts))\n"
                                            "    prompts, responses = rolled.prompts, rolled.responses"}),
    (12, "rlhf", "values = value.scores(prompts, responses)[0][:, :-1]  # (b, T')", {
        "the value after the token, not before": "values = value.scores(prompts, responses)[0][:, 1:]",
        "the value function has no gradient": "values = value.scores(prompts, responses)[0][:, :-1].detach()"}),
    (12, "rlhf", "x[rows, :mask.shape[1]] for x in", {
        "the first responses in place of the part's": "x[:len(rows), :mask.shape[1]] for x in",
        "the last columns in place of the first": "x[rows, -mask.shape[1]:] for x in"}),
    (12, "rlhf", "policy_loss = (ppo_loss(logps, old_logps, advantages, CLIP) * mask).sum() / len(rows)", {
        "padding counts in the policy's loss":
            "policy_loss = ppo_loss(logps, old_logps, advantages, CLIP).sum() / len(rows)",
        "the policy's loss is a mean over tokens":
            "policy_loss = (ppo_loss(logps, old_logps, advantages, CLIP) * mask).sum() / mask.sum()",
        "the policy's loss is a sum over responses":
            "policy_loss = (ppo_loss(logps, old_logps, advantages, CLIP) * mask).sum()",
        "the ratio is always 1":
            "policy_loss = (ppo_loss(logps, logps.detach(), advantages, CLIP) * mask).sum() / len(rows)",
        "old and new log-probs swapped":
            "policy_loss = (ppo_loss(old_logps, logps, advantages, CLIP) * mask).sum() / len(rows)",
        "returns in place of advantages":
            "policy_loss = (ppo_loss(logps, old_logps, returns, CLIP) * mask).sum() / len(rows)",
        "the value's clip for the ratio":
            "policy_loss = (ppo_loss(logps, old_logps, advantages, VALUE_CLIP) * mask).sum() / len(rows)"}),
    (12, "rlhf", "critic_loss = (value_loss(values, old_values, returns, VALUE_CLIP) * mask).sum() / len(rows)", {
        "padding counts in the value's loss":
            "critic_loss = value_loss(values, old_values, returns, VALUE_CLIP).sum() / len(rows)",
        "the value's loss is a mean over tokens":
            "critic_loss = (value_loss(values, old_values, returns, VALUE_CLIP) * mask).sum() / mask.sum()",
        "the value is fitted to the advantages":
            "critic_loss = (value_loss(values, old_values, advantages, VALUE_CLIP) * mask).sum() / len(rows)",
        "values are compared with themselves":
            "critic_loss = (value_loss(values, values.detach(), returns, VALUE_CLIP) * mask).sum() / len(rows)"}),
    (12, "rlhf", "loss, ratio = policy_loss + critic_loss,", {
        "the value's loss is forgotten": "loss, ratio = policy_loss,",
        "the value's loss is rewarded": "loss, ratio = policy_loss - critic_loss,"}),

    (13, "rlhf", "    value = data.scorer(ref, args)\n", {
        "the value function starts from the policy": "    value = data.scorer(policy, args)\n"}),
    (13, "rlhf", '        {"params": value.parameters(), "lr": 2 * args.lr}], weight_decay=0.0, fused=True)', {
        "the value function is not trained": "        ], weight_decay=0.0, fused=True)",
        "one learning rate for both":
            '        {"params": value.parameters(), "lr": args.lr}], weight_decay=0.0, fused=True)',
        "weight decay": '        {"params": value.parameters(), "lr": 2 * args.lr}], fused=True)'}),
    (13, "rlhf", "run.loop(args, both, optimizer, lambda both: evaluate(policy))", {
        "policy and value function are evaluated": "run.loop(args, both, optimizer, evaluate)"}),
    (13, "rlhf", "        asked = step.minibatch(prompts)\n", {
        "all prompts in place of a minibatch": "        asked = prompts\n"}),
    (13, "rlhf", 'rolled = roll_out(policy, ref, asked, judge, step.generator("rollout"), args)\n\n        # 3', {
        "pi_ref rolls out": 'rolled = roll_out(ref, ref, asked, judge, step.generator("rollout"), args)\n\n        # 3',
        "the same random numbers in every step":
            "rolled = roll_out(policy, ref, asked, judge, torch.Generator().manual_seed(args.seed), args)\n\n"
            "        # 3"}),
    (13, "rlhf", "        with torch.no_grad():\n            values = value.scores", {
        "advantages have a gradient": "        if True:\n            values = value.scores"}),
    (13, "rlhf", "values = value.scores(rolled.prompts, rolled.responses)[0][:, :-1]", {
        "values after the token, not before": "values = value.scores(rolled.prompts, rolled.responses)[0][:, 1:]",
        "no values": "values = 0 * value.scores(rolled.prompts, rolled.responses)[0][:, :-1]"}),
    (13, "rlhf", "advantages = gae(rolled.rewards, values, rolled.mask, GAE_LAMBDA)", {
        "lambda is 1": "advantages = gae(rolled.rewards, values, rolled.mask, 1.0)"}),
    (13, "rlhf", "returns = advantages + values\n        advantages = whiten(advantages, rolled.mask)", {
        "advantages are not whitened": "returns = advantages + values",
        "returns of whitened advantages": "advantages = whiten(advantages, rolled.mask)\n"
                                          "        returns = advantages + values",
        "returns are whitened, too":
            "returns = whiten(advantages + values, rolled.mask)\n"
            "        advantages = whiten(advantages, rolled.mask)",
        "the rewards for returns":
            "returns = rolled.rewards + values\n        advantages = whiten(advantages, rolled.mask)"}),
    (13, "rlhf", 'shuffle, updates = step.generator("ppo", device="cpu"), []', {
        "the same order in every step": "shuffle, updates = torch.Generator().manual_seed(args.seed), []",
        "another order in every run": "shuffle, updates = torch.Generator(), []\n        shuffle.seed()"}),
    (13, "rlhf", "[torch.randperm(len(asked), generator=shuffle) for _ in range(args.epochs)]", {
        "responses are not shuffled": "[torch.arange(len(asked)) for _ in range(args.epochs)]",
        "one order for all epochs": "[torch.randperm(len(asked), generator=shuffle)] * args.epochs",
        "one epoch whatever is asked": "[torch.randperm(len(asked), generator=shuffle)]",
        "some responses come twice, some never":
            "[torch.randint(len(asked), (len(asked),), generator=shuffle) for _ in range(args.epochs)]"}),
    (13, "rlhf", "order.tensor_split(args.minibatches)", {
        "parts of args.minibatches responses": "order.split(args.minibatches)",
        "fewer parts where they cannot be equal": "order.chunk(args.minibatches)",
        "no parts": "[order]"}),
    (13, "rlhf", "loss, metrics = ppo_objective(policy, value, rolled, values, advantages, returns, rows)", {
        "values are taken anew for every update":
            "values = value.scores(rolled.prompts, rolled.responses)[0][:, :-1].detach()\n"
            "            loss, metrics = ppo_objective(policy, value, rolled, values, advantages, returns, rows)",
        "returns and advantages swapped":
            "loss, metrics = ppo_objective(policy, value, rolled, values, returns, advantages, rows)",
        "a new roll-out for every update":
            'rolled = roll_out(policy, ref, asked, judge, step.generator("rollout"), args)\n'
            "            loss, metrics = ppo_objective(policy, value, rolled, values, advantages, returns, rows)"}),
    (13, "rlhf", "            run.clip(value, args.max_grad_norm)  # apart:", {
        "the value function's gradient is not clipped": "            # apart:"}),
    (13, "rlhf", "            grad_norm = run.clip(policy, args.max_grad_norm)\n            run", {
        "both are clipped together":
            "            grad_norm = run.clip(both, args.max_grad_norm)\n            run"}),
    (13, "rlhf", "            loss.backward()\n", {
        "the gradient is maximised": "            (-loss).backward()\n"}),
    (13, "rlhf", "            optimizer.step()\n            optimizer.zero_grad()\n", {
        "the gradients of all parts add up": "            optimizer.step()\n",
        "one update a step":
            "        optimizer.step()\n        optimizer.zero_grad()\n        if updates is not None:\n",
        "no step is taken": "            optimizer.zero_grad()\n"}),

    (14, "rlhf", "return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)", {
        "the baseline includes the sample": "return rewards - rewards.mean(1, keepdim=True)",
        "divided by k": "return rewards - (rewards.sum(1, keepdim=True) - rewards) / k",
        "one baseline for the whole batch": "return rewards - (rewards.sum() - rewards) / (rewards.numel() - 1)",
        "sums over prompts": "return rewards - (rewards.sum(0, keepdim=True) - rewards) / (k - 1)",
        "the sign reversed": "return (rewards.sum(1, keepdim=True) - rewards) / (k - 1) - rewards"}),

    (15, "rlhf", "gaps = rewards - rewards.mean(1, keepdim=True)", {
        "the mean is not taken off": "gaps = rewards",
        "one mean for the whole batch": "gaps = rewards - rewards.mean()",
        "the sign reversed": "gaps = rewards.mean(1, keepdim=True) - rewards"}),
    (15, "rlhf", "deviation = gaps.square().mean(1, keepdim=True).sqrt()", {
        "the unbiased deviation": "deviation = gaps.std(1, keepdim=True)",
        "the variance for the deviation": "deviation = gaps.square().mean(1, keepdim=True)",
        "one deviation for the whole batch": "deviation = gaps.square().mean().sqrt().expand(len(gaps), 1)"}),
    (15, "rlhf", "varied = deviation > 1e-6 * rewards.abs().amax(1, keepdim=True)", {
        "equal rewards become NaN": "varied = torch.ones_like(deviation).bool()",
        "equal rewards become their rounding error": "varied = deviation > 0",
        "small differences count as none": "varied = deviation > 0.1"}),
    (15, "rlhf", 'raise ValueError("normalising needs', {
        "one sample is let pass": 'print("normalising needs'}),

    (16, "rlhf", "advantages_of = grpo_advantages if args.grpo else rloo_advantages", {
        "RLOO whatever is asked": "advantages_of = rloo_advantages",
        "GRPO and RLOO swapped": "advantages_of = rloo_advantages if args.grpo else grpo_advantages"}),
    (16, "rlhf", "optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)", {
        "weight decay": "optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, fused=True)",
        "the learning rate is not args.lr":
            "optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)"}),
    (16, "rlhf", "asked = [prompt for prompt in step.minibatch(prompts) for _ in range(args.k)]", {
        "one row mixes prompts": "asked = step.minibatch(prompts) * args.k",
        "all prompts in place of a minibatch": "asked = [prompt for prompt in prompts for _ in range(args.k)]"}),
    (16, "rlhf", 'rolled = roll_out(policy, ref, asked, judge, step.generator("rollout"), args)\n\n        # adv', {
        "pi_ref rolls out":
            'rolled = roll_out(ref, ref, asked, judge, step.generator("rollout"), args)\n\n        # adv',
        "the same random numbers in every step":
            "rolled = roll_out(policy, ref, asked, judge, torch.Generator().manual_seed(args.seed), args)\n\n"
            "        # advantages",
        "other random numbers in every run":
            "anew = torch.Generator().manual_seed(torch.Generator().seed())\n"
            "        rolled = roll_out(policy, ref, asked, judge, anew, args)\n\n        # adv"}),
    (16, "rlhf", "advantages = advantages_of(rolled.rewards.sum(1).view(-1, args.k))", {
        "the last token's reward alone": "advantages = advantages_of(rolled.rewards[:, -1].view(-1, args.k))",
        "the mean of the tokens' rewards": "advantages = advantages_of(rolled.rewards.mean(1).view(-1, args.k))",
        "rewards in place of advantages": "advantages = rolled.rewards.sum(1).view(-1, args.k)",
        "samples and prompts transposed": "advantages = advantages_of(rolled.rewards.sum(1).view(args.k, -1).T)",
        "the KL charged twice":
            "kl, of_ref = (model.logps(rolled.prompts, rolled.responses) for model in (policy, ref))\n"
            "        kl = (kl - of_ref).detach()\n"
            "        advantages = advantages_of((rolled.rewards.sum(1) - args.beta * kl).view(-1, args.k))"}),
    (16, "rlhf", "logps = policy.logps(rolled.prompts, rolled.responses).view(-1, args.k)", {
        "the first token's log-prob for the response's":
            "logps = policy.token_logps(rolled.prompts, rolled.responses)[0][:, 0].view(-1, args.k)",
        "log-probs are averaged over tokens":
            "logps = policy.token_logps(rolled.prompts, rolled.responses)[0].mean(1).view(-1, args.k)"}),
    (16, "rlhf", "loss = -(advantages * logps).mean()", {
        "descent on the reward": "loss = (advantages * logps).mean()",
        "the loss summed over samples": "loss = -(advantages * logps).sum()",
        "mean advantage times mean log-prob": "loss = -advantages.mean() * logps.mean()"}),
    (16, "rlhf", UPDATE.format("policy"), of_update("policy")),

    (17, "lm", "kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1)", {
        "KL direction reversed": "kl = (log_ref.exp() * (log_ref - log_pi)).sum(-1)",
        "the expectation under pi_ref": "kl = (log_ref.exp() * (log_pi - log_ref)).sum(-1)",
        "the log-ratio of the sampled token": "ids = self.response_logits(*batch)[1]\n"
                                              "            kl = (log_pi - log_ref).gather(-1, ids[..., None])[..., 0]",
        "mean over the vocabulary": "kl = (log_pi.exp() * (log_pi - log_ref)).mean(-1)"}),
    (17, "lm", "torch.where(mask, kl, 0.0).sum(1)", {
        "mean over tokens instead of sum": "torch.where(mask, kl, 0.0).mean(1)",
        "padding counts": "kl.sum(1)"}),
    (17, "lm", "range(0, len(prompts), n), \"KL\"", {
        "the last, short batch is lost": "range(0, max(1, len(prompts) - n + 1), n), \"KL\""}),
    (17, "lm", "log_ref = ref.response_logits(*batch)[0]", {
        "the policy against itself": "log_ref = self.response_logits(*batch)[0]"}),

    (18, "hypo", "return (weights * logps).mean(1)", {
        "zero gradient: the sampled log-ratio is differentiated": "return logratios.mean(1)",
        "k3, whose gradient is the forward KL's": "return (torch.exp(-logratios) - 1 + logratios).mean(1)",
        "the log-prob is detached instead": "return (logratios * logps.detach()).mean(1)",
        "sum over samples instead of mean": "return (weights * logps).sum(1)"}),
    (18, "hypo", "weights = logratios.detach()", {
        "the weight is not detached": "weights = logratios",
        "the KL is maximised": "weights = -logratios.detach()"}),
    (18, "hypo", "weights = weights - (weights.sum(1, keepdim=True) - weights) / (k - 1)", {
        "the baseline includes the sample": "weights = weights - weights.mean(1, keepdim=True)",
        "one baseline for the whole batch": "weights = weights - (weights.sum() - weights) / (weights.numel() - 1)",
        "no baseline": "pass"}),
    (18, "hypo", "    if k > 1:\n", {
        "0/0 where there is one sample": "    if k >= 1:\n"}),

    (19, "hypo", "responses = policy.sample(prompts, args.max_new_tokens,", {
        "samples of pi_ref instead of the policy": "responses = ref.sample(prompts, args.max_new_tokens,",
        "samples of 24 tokens whatever is asked": "responses = policy.sample(prompts, 24,"}),
    (19, "hypo", 'step.generator("online"))', {
        "the same random numbers in every step": "torch.Generator().manual_seed(args.seed))",
        "other random numbers in every run": "torch.Generator().manual_seed(torch.Generator().seed()))",
        "samples at a low temperature, which are not the policy's": 'step.generator("online"), 0.7)'}),
    (19, "hypo", "batch = step.minibatch(pairs)", {
        "all pairs in place of a minibatch": "batch = pairs"}),
    (19, "hypo", "[pair.prompt for pair in batch for _ in range(args.k)]", {
        "one row of kl_loss mixes prompts": "[pair.prompt for pair in batch] * args.k"}),
    (19, "hypo", "        logps = policy.logps(prompts, responses)", {
        "offline responses instead of samples":
            "        responses = [pair.chosen for pair in batch for _ in range(args.k)]\n"
            "        logps = policy.logps(prompts, responses)",
        "the KL term has no gradient": "        logps = policy.logps(prompts, responses).detach()"}),
    (19, "hypo", "logratios = logps - ref.logps(prompts, responses)", {
        "the log-ratio upside down": "logratios = ref.logps(prompts, responses) - logps"}),
    (19, "hypo", "loss_kl = kl_loss(logps.view(-1, args.k), logratios.view(-1, args.k)).mean()", {
        "samples and prompts transposed":
            "loss_kl = kl_loss(logps.view(args.k, -1), logratios.view(args.k, -1)).mean()",
        "the KL term summed over prompts":
            "loss_kl = kl_loss(logps.view(-1, args.k), logratios.view(-1, args.k)).sum()",
        "a local score: each token weighed by its own log-ratio":
            "each, of_ref = (model.token_logps(prompts, responses)[0] for model in (policy, ref))\n"
            "        loss_kl = ((each - of_ref).detach() * each).sum(1).mean()"}),
    (19, "hypo", "loss = loss_dpo + args.lam * loss_kl", {
        "lam forgotten": "loss = loss_dpo + loss_kl",
        "the KL is rewarded": "loss = loss_dpo - args.lam * loss_kl"}),
    (19, "hypo", "dpo_loss(chosen_logratio, rejected_logratio, args.beta).mean()", {
        "chosen and rejected swapped": "dpo_loss(rejected_logratio, chosen_logratio, args.beta).mean()",
        "the DPO loss summed over pairs": "dpo_loss(chosen_logratio, rejected_logratio, args.beta).sum()"}),
    (19, "hypo", "chosen_logratio, rejected_logratio = policy.logratios(batch)", {
        "log-probs without the reference": "chosen_logratio, rejected_logratio = policy.pair_logps(batch)"}),
    (19, "hypo", "torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0,", {
        "the optimizer holds pi_ref's weights": "torch.optim.AdamW(ref.parameters(), lr=args.lr, weight_decay=0.0,",
        "the learning rate is not args.lr": "torch.optim.AdamW(policy.parameters(), weight_decay=0.0,",
        "weight decay moves what has no gradient": "torch.optim.AdamW(policy.parameters(), lr=args.lr,"}),
    (19, "hypo",
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
    (19, "hypo", "        optimizer.zero_grad()\n", {
        "the gradients of all steps add up": ""}),

    (20, "coverage", "return mean(rho, pi, pi - other)", {
        "KL direction reversed": "return mean(rho, other, other - pi)",
        "KL with prompts weighed alike": "return inner(pi, pi - other).mean()"}),
    (20, "coverage", "return V(b, pi) - b.beta * kl(b.rho, pi, b.ref)", {
        "the KL is rewarded": "return V(b, pi) + b.beta * kl(b.rho, pi, b.ref)",
        "no beta before the KL": "return V(b, pi) - kl(b.rho, pi, b.ref)"}),
    (20, "coverage", "return mean(b.rho, pi, b.reward)", {
        "the value of pi_ref": "return mean(b.rho, b.ref, b.reward)"}),
    (20, "coverage", "return (ref + reward / beta).log_softmax(-1)", {
        "a tilt by reward times beta": "return (ref + reward * beta).log_softmax(-1)",
        "a tilt that forgets pi_ref": "return (reward / beta).log_softmax(-1)",
        "normalised over prompts": "return (ref + reward / beta).log_softmax(0)"}),
    (20, "coverage", "return (ref + reward / beta).logsumexp(-1)", {
        "Z without pi_ref": "return (reward / beta).logsumexp(-1)",
        "exp overflows": "return (ref.exp() * (reward / beta).exp()).sum(-1).log()"}),

    (21, "coverage", "radius = (eps_kl / rho)[:, None]", {
        "the radius is not divided by rho(x)": "radius = torch.full_like(rho, eps_kl)[:, None]"}),
    (21, "coverage", "covered = (ref > -INF) & (rho > 0)[:, None]", {
        "prompts that never come count": "covered = ref > -INF"}),
    (21, "coverage", "cost = a * middle + torch.special.xlog1py(1 - a, -(rise / (1 - p)).clamp(max=1))", {
        "the other responses' part of the KL is forgotten": "cost = a * middle",
        "KL direction reversed": "cost = -p * middle + (1 - p) * ((1 - p) / (1 - a)).log()"}),
    (21, "coverage", "return (ref + high - (ref if mu is None else mu))[covered].exp().max()", {
        "the ratio to pi_ref, not to mu": "return high[covered].exp().max()"}),
    (21, "coverage", "return global_coverage(rho, ref if mu is None else mu)", {
        "an infinite radius forgets mu": "return global_coverage(rho, ref)"}),
    (21, "coverage", "return (-mu[rho > 0]).exp().max()", {
        "global coverage of prompts that never come": "return (-mu).exp().max()",
        "the commonest response": "return (-mu[rho > 0]).exp().min()"}),

    (22, "coverage", "torch.log1p(-mass) + pi.masked_fill(~seen, -INF).log_softmax(-1)", {
        "seen responses keep all their mass": "pi.masked_fill(~seen, -INF).log_softmax(-1)",
        "pi is not conditioned on the seen": "torch.log1p(-mass) + pi",
        "the seen responses become alike":
            "torch.log1p(-mass) + torch.zeros_like(pi).masked_fill(~seen, -INF).log_softmax(-1)"}),
    (22, "coverage", "(mass / (~seen).sum(-1, keepdim=True)).log()", {
        "every unseen response gets m": "mass.log().expand_as(pi)",
        "unseen responses of all prompts share m": "(mass / (~seen).sum()).log()"}),
    (22, "coverage", "return torch.where(seen, q - inner(q, q - b.ref)[:, None], b.ref).log_softmax(-1)", {
        "the sign of K": "return torch.where(seen, q + inner(q, q - b.ref)[:, None], b.ref).log_softmax(-1)",
        "K forgotten": "return torch.where(seen, q, b.ref).log_softmax(-1)",
        "unseen responses alike":
            "return torch.where(seen, q - inner(q, q - b.ref)[:, None], torch.zeros_like(q)).log_softmax(-1)"}),

    (23, "eval", "wins = sum(0.5 * (a == b) + (a > b) for", {
        "a tie is lost": "wins = sum((a > b) for",
        "a tie is won": "wins = sum((a >= b) for",
        "ties are left out of n": "n = sum(a != b for a, b in zip(rewards, opponent_rewards)) or 1\n"
                                  "    wins = sum((a > b) for",
        "losses are counted": "wins = sum(0.5 * (a == b) + (a < b) for"}),
    (23, "eval", "return wins / n, wilson_interval(wins, n)", {
        "the interval of the rate, not of the wins": "return wins / n, wilson_interval(wins / n, n)"}),
    (23, "eval", "half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n + z * z / 4)", {
        "the plain interval rate +- z sd": "half = z * math.sqrt(wins * (n - wins) / n) / n",
        "z^2/4 forgotten": "half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n)",
        "z is 1.96 whatever is asked": "half = 1.96 / (n + 1.96**2) * math.sqrt(wins * (n - wins) / n + 1.96**2 / 4)"}),
    (23, "eval", "center = (wins + z * z / 2) / (n + z * z)", {
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
    failed = [row for row in verdicts if row["points"] < row["of"]]
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
        how = f"{len(own['failures'])} of {len(own['tests'])} tests" if caught(mutant, verdicts) else (
            f"WRONG: failed {[row['number'] for row in verdicts if row['points'] < row['of']]}, {own['problem']}")
        print(f"{mutant.exercise:8}  {mutant.module + '.py':11}  {mutant.mistake:56}  {how}")
    wrong = sum(not caught(mutant, verdicts) for mutant, verdicts in zip(planted, results))
    print(f"{len(planted)} planted mistakes, {len(planted) - wrong} caught by the right exercise and by no other")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run_command(main)

"""DPO, IPO and Best-of-2, each on pairs that are offline, online, or refreshed in rounds.

    python dpo.py                                      # DPO on 400 offline pairs of the built-in world
    python dpo.py --loss ipo --sampling online         # IPO on pairs that the policy itself just wrote
    python dpo.py --loss ipo --sampling iterative --rounds 4
    python dpo.py --model gpt2                         # a pretrained model, on film reviews (recipes/README.md)
    python dpo.py --model gpt2 --data pairs.jsonl      # or on your own preferences

Every loss sees a policy only through log-ratios h(y) = log pi(y|x) - log pi_ref(y|x), nats a sequence:

    DPO   -log sigmoid(beta (h(y+) - h(y-)))             Rafailov et al. 2023, arXiv 2305.18290, eq. 7
    IPO   (h(y+) - h(y-) - 1/(2 beta))^2                 Azar et al. 2023, arXiv 2310.12036, eq. 17
    Bo2   -log pi(y+|x)                                  Best-of-2: imitate the winner

What differs between offline, online and iterative training is only where the pairs come from, and that is
the question of Tang et al. 2024 (arXiv 2405.08448): the loss, the reference and the loop stay the same.

Left out or different: the losses are means over the minibatch where papers write sums; the learning rate
is constant; the gradient's norm is clipped; IPO's target is 1/(2 beta) on summed log-ratios (some slides
print beta/2, and some libraries divide log-ratios by the response's length: --length-average).
"""

import torch
import torch.nn.functional as F

import data
import lm
import run
from eval import evaluator, finish
from task import set_up

# ---------------------------------------------------------------------------------------------------
# losses: log-ratios (B,) of chosen and rejected responses in, one loss a pair (B,) out


def dpo_loss(chosen_logratio, rejected_logratio, beta: float):
    """-log sigmoid(beta * margin): log 2 at pi = pi_ref; its slope in the margin is -beta sigmoid(-beta margin).

    >>> dpo_loss(torch.zeros(1), torch.zeros(1), beta=0.1)
    tensor([0.6931])
    """
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))


def ipo_loss(chosen_logratio, rejected_logratio, beta: float):
    """(margin - 1/(2 beta))^2: 1/(4 beta^2) at pi = pi_ref, zero where the margin is 1/(2 beta).

    >>> ipo_loss(torch.tensor([3.]), torch.tensor([-2.]), beta=0.1)
    tensor([0.])
    """
    return (chosen_logratio - rejected_logratio - 1 / (2 * beta)) ** 2


def bo2_loss(chosen_logps):
    """-log pi(chosen): supervised fine-tuning on the better of two. No contrast, no reference, no beta."""
    return -chosen_logps


# ---------------------------------------------------------------------------------------------------
# where pairs come from: functions step -> list of pairs, as from lm.add_ref_logps


def offline(ref, pairs: list[dict], args):
    """Minibatches of the same pairs, epoch after epoch."""
    pairs = lm.add_ref_logps(ref, pairs)
    return lambda step: run.minibatch(pairs, args, step)


def online(policy, ref, tokenizer, prompts: list[str], judge, args):
    """In every step two fresh samples of the policy, as it is now, for each prompt of a minibatch."""
    def pairs_of_step(step: int) -> list[dict]:
        asked = run.minibatch(prompts, args, step)
        return online_pairs(policy, ref, tokenizer, asked, judge, run.generator(args, "online", step), args)
    return pairs_of_step


def iterative(policy, ref, tokenizer, prompts: list[str], judge, args):
    """args.pairs fresh pairs at the first step of a round, kept in a file for the round's other steps."""
    pairs = []

    def pairs_of_step(step: int) -> list[dict]:
        number, step_of_round = divmod(step - 1, args.round_steps)
        path = args.out / f"round-{number}.jsonl"
        if step_of_round == 0:
            asked = [prompts[i % len(prompts)] for i in range(args.pairs)]
            generator = run.generator(args, "round", number)
            data.write_jsonl(path, online_pairs(policy, ref, tokenizer, asked, judge, generator, args))
        if step_of_round == 0 or not pairs:
            pairs[:] = data.read_rows(path)
        return run.minibatch(pairs, args, step) if pairs else []  # [] if all of the round's prompts were ties
    return pairs_of_step


def online_pairs(policy, ref, tokenizer, prompts: list[str], judge, generator, args) -> list[dict]:
    """Two fresh samples of the policy for each prompt, the better one chosen; the judge's ties are skipped."""
    prompt_ids = [lm.encode_prompt(tokenizer, prompt) for prompt in prompts]
    responses = lm.sample(policy, prompt_ids * 2, args.max_new_tokens, tokenizer.eos_token_id, generator)
    rewards = judge(prompts * 2, [lm.decode(tokenizer, response) for response in responses])
    n, pairs = len(prompts), []
    for i, prompt in enumerate(prompt_ids):
        if rewards[i] != rewards[i + n]:
            chosen, rejected = (i, i + n) if rewards[i] > rewards[i + n] else (i + n, i)
            pairs.append({"prompt": prompt, "chosen": responses[chosen], "rejected": responses[rejected]})
    return lm.add_ref_logps(ref, pairs)


# ---------------------------------------------------------------------------------------------------
# training


def train(policy, pairs_of_step, evaluate, args) -> None:
    """Minimise a loss on the pairs that a source gives for each step: the one loop of all nine combinations.

    pairs_of_step: from offline, online or iterative above. evaluate: function policy -> metrics.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    for step, metrics in run.loop(args, policy, optimizer, evaluate):
        batch = pairs_of_step(step)  # the only difference between offline, online and iterative training
        metrics["pairs"] = len(batch)
        if not batch:  # every prompt was a tie: nothing to learn from
            continue

        # log-ratios; pi_ref's log-probs were taken when the pairs were made
        chosen_logps, rejected_logps = lm.pair_logps(policy, batch)  # (B,), (B,)
        ref_chosen_logps, ref_rejected_logps = lm.ref_logps(batch, policy.device)
        chosen_logratio = chosen_logps - ref_chosen_logps
        rejected_logratio = rejected_logps - ref_rejected_logps
        metrics.update(train_chosen_logratio=chosen_logratio.detach().mean(),
                       train_rejected_logratio=rejected_logratio.detach().mean(),
                       tokens=sum(len(pair["chosen"]) + len(pair["rejected"]) for pair in batch))

        # the loss, and one step down its gradient
        if args.length_average:
            chosen_lengths, rejected_lengths = lm.pair_lengths(batch, policy.device)
            chosen_logratio, rejected_logratio = chosen_logratio / chosen_lengths, rejected_logratio / rejected_lengths
        if args.loss == "dpo":
            loss = dpo_loss(chosen_logratio, rejected_logratio, args.beta).mean()
        elif args.loss == "ipo":
            loss = ipo_loss(chosen_logratio, rejected_logratio, args.beta).mean()
        else:
            loss = bo2_loss(chosen_logps).mean()
        metrics.update(loss=loss.detach(), grad_norm=run.update(policy, optimizer, loss, args))


def main(argv=None):
    parser = run.parser(__doc__)
    add = parser.add_argument_group("dpo.py").add_argument
    add("--loss", choices=["dpo", "ipo", "bo2"], default="dpo", help="the loss on a pair (default dpo)")
    add("--sampling", choices=["offline", "online", "iterative"], default="offline", help="where pairs come from: "
        "offline, collected once from pi_ref; online, two fresh samples for each prompt in every step, labelled "
        "by --judge; iterative, --pairs fresh pairs at the start of each round (default offline)")
    add("--rounds", type=int, default=4, help="rounds of iterative training (default 4)")
    add("--length-average", action="store_true", help="IPO on log-ratios divided by the response's length")
    args = run.parse(parser, argv)
    if args.length_average and args.loss != "ipo":
        parser.error(f"--length-average is an option of --loss ipo; --loss {args.loss} would ignore it")
    if args.sampling != "offline" and args.judge == "none":
        parser.error(f"--sampling {args.sampling} needs --judge to label the policy's samples: golden, vader, or "
                     "a directory with a reward model")
    if args.sampling == "iterative" and not 1 <= args.rounds <= args.steps:
        parser.error(f"--rounds must be from 1 to --steps {args.steps}, got {args.rounds}")
    args.round_steps = -(-args.steps // max(1, args.rounds))

    with run.precision(args):
        s = set_up(args)
        run.prepare(args, args.loss if args.sampling == "offline" else f"{args.sampling} {args.loss}")
        # whoever labels the pairs, the task's own judges measure the outcome
        evaluate = evaluator(args, s.ref, s.tokenizer, s.held_out_prompts, s.held_out, s.outcome, s.second)
        if args.sampling == "offline":
            source = offline(s.ref, s.pairs, args)
        else:
            source = (online if args.sampling == "online" else iterative)(
                s.policy, s.ref, s.tokenizer, s.prompts, s.label, args)
        train(s.policy, source, evaluate, args)
        finish(args, s.policy, s.tokenizer, run.seconds(args))


if __name__ == "__main__":
    run.start(main)

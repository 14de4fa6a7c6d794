"""DPO, IPO and Best-of-2, each on pairs that are offline, online, or refreshed in rounds.

    python dpo.py                                    # DPO on 400 offline pairs of the world
    python dpo.py --loss ipo --sampling online       # IPO on pairs that the policy just wrote
    python dpo.py --loss ipo --sampling iterative --rounds 4
    python dpo.py --model gpt2                       # film reviews, see recipes/README.md
    python dpo.py --model gpt2 --data pairs.jsonl    # or your own preferences

Every loss sees a policy only through log-ratios h(y) = log pi(y|x) - log pi_ref(y|x), nats a
sequence. y+ (y_w, chosen) was preferred to y- (y_l, rejected); pi_ref (pi_sft) is where training
starts:

    DPO   -log sigmoid(beta (h(y+) - h(y-)))     Rafailov et al. 2023, arXiv 2305.18290, eq. 7
    IPO   (h(y+) - h(y-) - 1/(2 beta))^2         Azar et al. 2023, arXiv 2310.12036, eq. 17
    Bo2   -log pi(y+|x)                          Best-of-2: imitate the winner

What differs between offline, online and iterative training is where the pairs come from, and that is
the question of Tang et al. 2024 (arXiv 2405.08448): loss, reference and loop stay the same. Labels
differ, too: offline they are drawn from Bradley-Terry, online the judge's larger reward always wins.

Left out or different: the losses are means over the minibatch where papers write sums; the learning
rate falls in a line to 0; the gradient's norm is clipped. IPO's target is 1/(2 beta) on summed
log-ratios: a larger beta then holds the policy closer, as it does everywhere else. (The slides print
beta/2, with which it would hold less; --length-average divides by the length, as some libraries do.)
"""

import functools
import math

import torch
import torch.nn.functional as F

import data
import run
from eval import Evaluator, finish

# ---- losses: log-ratios (B,) of chosen and rejected responses in, one loss a pair (B,) out

def dpo_loss(chosen_logratio, rejected_logratio, beta: float):
    """-log sigmoid(beta * margin): log 2 at pi = pi_ref, slope -beta sigmoid(-beta margin) in it.

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
    """-log pi(chosen): fine-tuning on the better of two. No contrast, no reference, no beta."""
    return -chosen_logps


# ---- where pairs come from: functions step -> the step's lm.Encoded pairs

def offline(start, args):
    """Minibatches of the same pairs, epoch after epoch."""
    return lambda step: step.minibatch(start.pairs)


def online(start, args):
    """In every step two fresh samples of the policy, as it is now, for each prompt of a minibatch."""
    return lambda step: online_pairs(
        start, step.minibatch(start.prompts), step.generator("online"), args)


def iterative(start, args):
    """As many fresh pairs as there are offline at the first step of each round, for all of its steps."""
    round_steps = math.ceil(args.steps / args.rounds)
    pairs: list = []

    def pairs_of(step):
        """The step's minibatch; [] if all of the round's prompts were ties."""
        nonlocal pairs
        number, step_of_round = divmod(step.number - 1, round_steps)
        path = args.out / f"round-{number}.jsonl"
        if step_of_round == 0:
            asked = [start.prompts[i % len(start.prompts)] for i in range(len(start.pairs))]
            pairs = online_pairs(start, asked, step.generator("round", number), args)
            data.write_pairs(path, pairs)
        elif not pairs:  # resumed inside a round, or the round had only ties
            pairs = data.read_pairs(path)
        return step.minibatch(pairs) if pairs else []
    return pairs_of


def online_pairs(start, prompts, generator, args):
    """Two samples of the policy for each prompt, the better one chosen; the judge's ties are left out."""
    n = len(prompts)
    prompt_ids, ids, texts = start.policy.respond(prompts * 2, args.max_new_tokens, generator)
    rewards = start.label(prompts * 2, texts)  # 2 n, the first responses' first
    pairs = []
    for i, j in zip(range(n), range(n, 2 * n)):  # the two responses to one prompt
        if rewards[i] != rewards[j]:
            winner, loser = (i, j) if rewards[i] > rewards[j] else (j, i)
            pairs.append(data.Encoded(prompt_ids[i], ids[winner], ids[loser]))
    return data.add_ref_logps(start.ref, pairs)


SOURCES = {"offline": offline, "online": online, "iterative": iterative}


# ---- training

def train(policy, pairs_of, evaluate, args) -> None:
    """Minimise a loss on the pairs that a source gives: the one loop of all nine combinations."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    numbers = functools.partial(torch.tensor, device=policy.device)
    for step in run.loop(args, policy, optimizer, evaluate):
        # pairs: the only difference between offline, online and iterative training
        batch = pairs_of(step)
        if not batch:  # every prompt was a tie: nothing to learn from
            step.log(pairs=0)
            continue

        # log-ratios h(y) = log pi(y|x)/pi_ref(y|x) of whole responses
        chosen_logratio, rejected_logratio = policy.logratios(batch)  # (B,), (B,)
        h_chosen, h_rejected = chosen_logratio, rejected_logratio
        if args.length_average:
            h_chosen = h_chosen / numbers([len(pair.chosen) for pair in batch])
            h_rejected = h_rejected / numbers([len(pair.rejected) for pair in batch])

        # the loss
        if args.loss == "dpo":
            loss = dpo_loss(h_chosen, h_rejected, args.beta).mean()
        elif args.loss == "ipo":
            loss = ipo_loss(h_chosen, h_rejected, args.beta).mean()
        else:  # log pi = h + log pi_ref
            loss = bo2_loss(h_chosen + numbers([pair.ref_chosen for pair in batch])).mean()

        # update
        loss.backward()
        grad_norm = run.clip(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        step.log(loss=loss, grad_norm=grad_norm, pairs=len(batch),
                 train_chosen_logratio=chosen_logratio.mean(),
                 train_rejected_logratio=rejected_logratio.mean(),
                 tokens=sum(len(pair.chosen) + len(pair.rejected) for pair in batch))


def useless(args) -> dict[str, str]:
    """Flags that would have no effect, and why."""
    why: dict[str, str] = {}
    if args.sampling != "iterative":
        why["rounds"] = f"--sampling {args.sampling} has no rounds"
    if args.loss != "ipo":
        why["length_average"] = f"it is for --loss ipo, not for --loss {args.loss}"
    if args.loss == "bo2":
        why["beta"] = "--loss bo2 has no reference policy to stay near"
    return why


def main(argv=None, begin=data.start, source=None):
    """The command. begin: args -> data.Start; source: another source of pairs than SOURCES has."""
    parser, add = run.parser(__doc__)
    add("--loss", choices=["dpo", "ipo", "bo2"], default="dpo", help="the loss (default dpo)")
    add("--sampling", choices=SOURCES, default="offline", help="where pairs come from: offline, "
        "collected once from pi_ref; online, two fresh samples for each prompt in every step, "
        "labelled by --judge; iterative, as many fresh pairs at the start of each round (default "
        "offline)")
    add("--rounds", type=run.COUNT, default=4, help="rounds of iterative training (default 4)")
    add("--length-average", action="store_true", help="IPO on log-ratios divided by the length")
    args = run.parse(parser, argv, lambda args: (
        args.loss if args.sampling == "offline" else f"{args.sampling} {args.loss}"), useless)
    if args.sampling != "offline" and args.judge == "none":
        parser.error(f"--sampling {args.sampling} needs --judge to label the policy's samples: "
                     "golden, vader, or a directory with a reward model")
    if args.sampling == "iterative" and args.rounds > args.steps:
        parser.error(f"--rounds must be from 1 to --steps {args.steps}, got {args.rounds}")

    with run.working(args):
        start = begin(args)  # pi_ref, pairs, prompts, judges
        run.prepare(args, start.inputs())
        pairs_of = (source or SOURCES[args.sampling])(start, args)
        train(start.policy, pairs_of, Evaluator(start, args), args)
        finish(start, args)  # policy/, summary.json, curve.png


if __name__ == "__main__":
    run.start(main)

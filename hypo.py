"""HyPO, Hybrid Preference Optimization: the DPO loss on offline pairs plus the reverse KL online.

    python hypo.py                                  # the built-in world, half a minute on a laptop
    python hypo.py --lam 0 --lr 1e-3                # DPO: the same policy as dpo.py, to the byte
    python hypo.py --model gpt2                     # film reviews, see recipes/README.md
    python hypo.py --model gpt2 --data pairs.jsonl  # or your own preferences

Algorithm 1 of Song, Swamy, Singh, Bagnell, Sun 2024, "The Importance of Online Data: Understanding
Preference Fine-tuning via Coverage" (arXiv 2406.01462):

    require  pretrained LLM pi_theta0, reference policy pi_ref, offline data D, learning rate alpha,
             KL coefficient lam
    1: for t = 1, ..., T do
    2:   Sample a minibatch of offline data D_off := {x, y+, y-} ~ D.
    3:   Compute the DPO loss l_dpo := sum over D_off of log sigmoid(
             beta log pi(y+|x)/pi_ref(y+|x) - beta log pi(y-|x)/pi_ref(y-|x)).
    4:   Sample (unlabeled) online data D_on := {x, y} where x ~ D, y ~ pi_theta(t-1)(x).
    5:   Compute l_kl := sum over D_on of log pi(y|x) * sg(log pi(y|x)/pi_ref(y|x)).
    6:   Update theta_t = theta_(t-1) + alpha * grad(l_dpo - lam * l_kl).
    return pi_T

Why: pairs hold responses that are likely under pi_ref. Everywhere else the offline loss leaves the
policy free, and its KL to pi_ref may grow without bound. The second term holds the policy near
pi_ref at the policy's own samples. This term needs neither labels nor a reward model.

Different here: we minimise, so loss_dpo = -l_dpo, and line 6 descends on loss_dpo + lam * loss_kl.
AdamW takes the step, with a clipped gradient, at a rate that falls in a line to 0. D_on has k
samples for each of the minibatch's prompts. Sums are means, so --lam is k times the box's lambda.
With --k 1 the samples enter as line 5 prints it. With k >= 2 the mean log-ratio of the prompt's other
samples is subtracted from the weight (leave-one-out), as in the paper's experiments: the same
expected gradient, usually less noise.
"""

import torch

import data
import run
from dpo import dpo_loss
from eval import Evaluator, finish


def kl_loss(logps, logratios):
    """Line 5 for the k samples of each prompt: logps and logratios (N, k) -> loss (N,).

    Write h(y) for the log-ratio log pi(y)/pi_ref(y). The gradient of KL = sum_y pi(y) h(y) is

        sum_y [grad pi(y)] h(y) + sum_y pi(y) grad h(y) = E_{y ~ pi}[ h(y) grad log pi(y) ],

    for grad pi = pi grad log pi = pi grad h: the second sum is grad sum_y pi(y) = grad 1 = 0. Hence
    E[b grad log pi(y)] = 0, too, for every b that does not depend on y: to subtract b from h changes
    the noise and no expectation. Here b is the mean h of the prompt's other samples, 0 for k = 1.
    The loss is a surrogate: its gradient is right on average, its value is no KL.

    >>> kl_loss(torch.tensor([[-2.0, -5.0]]), torch.tensor([[0.5, -1.5]]))  # (2 * -2 + -2 * -5) / 2
    tensor([3.])
    """
    k = logratios.shape[1]
    # sg, stop-gradient: the weight is a number. If it moved, the product rule would add log pi *
    # grad log pi, and raise the entropy. And h alone is no loss: grad h = grad log pi has mean 0,
    # for autograd does not see that the samples depend on pi.
    weights = logratios.detach()
    if k > 1:
        weights = weights - (weights.sum(1, keepdim=True) - weights) / (k - 1)
    return (weights * logps).mean(1)


def train(policy, ref, pairs, evaluate, args) -> None:
    """Algorithm 1. policy: lm.LM; ref: a frozen copy of it as it was at first; pairs: lm.Encoded."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)

    # 1: for t = 1, ..., T do
    for step in run.loop(args, policy, optimizer, evaluate):
        # 2: sample a minibatch of offline data
        batch = step.minibatch(pairs)

        # 3: the DPO loss, on log-ratios h(y) = log pi(y|x)/pi_ref(y|x) of whole responses; pi_ref's
        # part is stored in each pair (ref_chosen, ref_rejected), for it never changes
        chosen_logratio, rejected_logratio = policy.logratios(batch)  # (B,), (B,)
        loss_dpo = dpo_loss(chosen_logratio, rejected_logratio, args.beta).mean()

        # 4: sample unlabeled online data from the policy as it is now, k responses to each prompt
        prompts = [pair.prompt for pair in batch for _ in range(args.k)]
        responses = policy.sample(prompts, args.max_new_tokens, step.generator("online"))

        # 5: the KL loss; one row holds the k samples of one prompt
        logps = policy.logps(prompts, responses)  # (B * k,) with a gradient: sampling kept none
        with torch.no_grad():  # pi_ref is fixed, and the weights of the loss are numbers
            logratios = logps - ref.logps(prompts, responses)  # (B * k,)
        loss_kl = kl_loss(logps.view(-1, args.k), logratios.view(-1, args.k)).mean()

        # 6: update; Algorithm 1 ascends on l_dpo - lam l_kl, we descend on its negative
        loss = loss_dpo + args.lam * loss_kl
        loss.backward()
        grad_norm = run.clip(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        step.log(loss=loss, loss_dpo=loss_dpo, loss_kl=loss_kl, grad_norm=grad_norm,
                 online_kl=logratios.mean(), train_chosen_logratio=chosen_logratio.mean(),
                 train_rejected_logratio=rejected_logratio.mean(),
                 tokens=sum(len(pair.chosen) + len(pair.rejected) for pair in batch)
                 + sum(map(len, responses)))
    # return pi_T: the policy was trained in place


def main(argv=None, begin=data.start):
    """The command. begin: args -> data.Start; the studies begin with pairs of their own."""
    parser, add = run.parser(__doc__)
    add("--lam", type=run.NUMBER, default=0.004, help="lambda, the weight of the reverse KL on online "
        "samples; 0 is DPO (default 0.004)")
    add("--k", type=run.COUNT, default=2, help="online samples a prompt; 1 is Algorithm 1 as printed, more "
        "subtract the leave-one-out mean (default 2)")
    args = run.parse(parser, argv, lambda args: "hypo", tiny_lr=2e-3)
    with run.working(args):
        start = begin(args)  # pi_ref, pairs, prompts, judges
        run.prepare(args, start.inputs())
        train(start.policy, start.ref, start.pairs, Evaluator(start, args), args)
        finish(start, args)  # policy/, summary.json, curve.png


if __name__ == "__main__":
    run.start(main)

"""HyPO, Hybrid Preference Optimization: the DPO loss on offline pairs plus the reverse KL on online samples.

    python hypo.py                                     # the built-in world, a minute on a laptop
    python hypo.py --lam 0                             # exactly dpo.py
    python hypo.py --model gpt2                        # a pretrained model, on film reviews (recipes/README.md)
    python hypo.py --model gpt2 --data pairs.jsonl     # or on your own preferences

Algorithm 1 of Song, Swamy, Singh, Bagnell, Sun 2024, "The Importance of Online Data: Understanding
Preference Fine-tuning via Coverage" (arXiv 2406.01462):

    require  pretrained LLM pi_theta0, reference policy pi_ref, offline data D, learning rate alpha, KL coefficient lam
    1: for t = 1, ..., T do
    2:   Sample a minibatch of offline data D_off := {x, y+, y-} ~ D.
    3:   Compute the DPO loss
             l_dpo := sum over D_off of log sigmoid(beta log pi(y+|x)/pi_ref(y+|x) - beta log pi(y-|x)/pi_ref(y-|x)).
    4:   Sample (unlabeled) online data D_on := {x, y} where x ~ D, y ~ pi_theta(t-1)(x).
    5:   Compute l_kl := sum over D_on of log pi(y|x) * sg(log pi(y|x)/pi_ref(y|x)).
    6:   Update theta_t = theta_(t-1) + alpha * grad(l_dpo - lam * l_kl).
    return pi_T

Why: the offline loss sees the policy only at responses that are in the data. Where pi_ref rarely goes it
leaves the policy free, and the KL to pi_ref may grow without bound. The second term holds the policy near
pi_ref where the policy itself goes, and needs samples for that, but neither labels nor a reward model.

Different here: we minimise, so l_dpo has the sign of a loss, and line 6 descends on l_dpo + lam * l_kl;
sums are means; AdamW with a clipped gradient takes the step; D_on has k samples for each of the minibatch's
prompts. --k 1 is line 5 word for word. With k >= 2 the mean log-ratio of a prompt's other samples is
subtracted from the weight (leave-one-out), as in the paper's experiments: same expected gradient, less noise.
"""

import torch

import lm
import run
from dpo import dpo_loss
from eval import evaluator, finish
from task import set_up


def kl_loss(logps, logratios):
    """Line 5 for the k samples of each prompt: logps and logratios (N, k) -> loss (N,).

    Not the KL itself, but a surrogate whose expected gradient is that of the reverse KL:

        grad KL(pi || pi_ref) = E_{y ~ pi}[ (log pi(y)/pi_ref(y) - b) grad log pi(y) ]

    for every b that does not depend on y; here b is the mean log-ratio of the prompt's other samples, 0 for
    k = 1, and the loss the mean over the k samples. Differentiating the sampled log-ratio itself instead would
    give a gradient of mean zero: the weight is a number (sg, stop-gradient), the log-prob is what moves.
    """
    k = logratios.shape[1]
    weights = logratios.detach()
    if k > 1:
        weights = weights - (weights.sum(1, keepdim=True) - weights) / (k - 1)
    return (weights * logps).mean(1)


def train(policy, ref, tokenizer, pairs: list[dict], evaluate, args) -> None:
    """Algorithm 1. pairs: offline pairs of token ids as from lm.add_ref_logps; evaluate: policy -> metrics."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)

    # 1: for t = 1, ..., T do
    for t, metrics in run.loop(args, policy, optimizer, evaluate):
        # 2: sample a minibatch of offline data
        batch = run.minibatch(pairs, args, t)

        # 3: the DPO loss; pi_ref's log-probs of offline data were taken once, before training
        chosen_logps, rejected_logps = lm.pair_logps(policy, batch)  # (B,), (B,)
        ref_chosen_logps, ref_rejected_logps = lm.ref_logps(batch, policy.device)
        chosen_logratio = chosen_logps - ref_chosen_logps
        rejected_logratio = rejected_logps - ref_rejected_logps
        loss = loss_dpo = dpo_loss(chosen_logratio, rejected_logratio, args.beta).mean()
        metrics.update(loss_dpo=loss_dpo.detach(), train_chosen_logratio=chosen_logratio.detach().mean(),
                       train_rejected_logratio=rejected_logratio.detach().mean(),
                       tokens=sum(len(pair["chosen"]) + len(pair["rejected"]) for pair in batch))

        if args.lam > 0:  # with lam = 0 this is DPO, and samples would be for nothing
            # 4: sample unlabeled online data, k responses to each of the minibatch's prompts
            prompts = [pair["prompt"] for pair in batch for _ in range(args.k)]
            responses = lm.sample(policy, prompts, args.max_new_tokens, tokenizer.eos_token_id,
                                  run.generator(args, "online", t))

            # 5: the KL loss on sequence log-ratios
            logps = lm.logps(policy, prompts, responses)  # (B * k,)
            with torch.no_grad():
                logratios = logps - lm.logps(ref, prompts, responses)  # (B * k,)
            loss_kl = kl_loss(logps.view(-1, args.k), logratios.view(-1, args.k)).mean()
            loss = loss_dpo + args.lam * loss_kl
            metrics.update(loss_kl=loss_kl.detach(), online_kl=logratios.mean(),
                           tokens=metrics["tokens"] + sum(map(len, responses)))

        # 6: update
        metrics.update(loss=loss.detach(), grad_norm=run.update(policy, optimizer, loss, args))
    # return pi_T: the policy was trained in place


def main(argv=None):
    parser = run.parser(__doc__)
    add = parser.add_argument_group("hypo.py").add_argument
    add("--lam", type=float, default=0.004, help="lambda, the weight of the reverse KL on online samples; 0 is DPO "
        "(default 0.004)")
    add("--k", type=int, default=2, help="online samples a prompt; 1 is Algorithm 1 as printed, more subtract the "
        "leave-one-out mean (default 2)")
    args = run.parse(parser, argv)
    if args.lam < 0:
        parser.error(f"--lam must not be negative, got {args.lam}")
    if args.k < 1:
        parser.error(f"--k must be at least 1, got {args.k}")

    with run.precision(args):
        s = set_up(args)
        run.prepare(args, "hypo")
        evaluate = evaluator(args, s.ref, s.tokenizer, s.held_out_prompts, s.held_out, s.outcome, s.second)
        train(s.policy, s.ref, s.tokenizer, lm.add_ref_logps(s.ref, s.pairs), evaluate, args)
        finish(args, s.policy, s.tokenizer, run.seconds(args))


if __name__ == "__main__":
    run.start(main)

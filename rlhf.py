"""RLHF in its two classical stages: a reward model by maximum likelihood, then KL-regularised PPO.

    python rlhf.py                               # both stages on 400 pairs of the built-in world
    python rlhf.py --pairs 2000                  # a better reward model
    python rlhf.py --beta 0 --out runs/hacked    # no KL term: the policy hacks the reward model
    python rlhf.py --rloo                        # no critic: REINFORCE, leave-one-out baseline
    python rlhf.py --grpo                        # no critic: each prompt's rewards are normalised
    python dpo.py --sampling online --judge runs/ppo/reward/model    # the reward model as a judge

Stage 1, Bradley-Terry maximum likelihood on preference pairs (x, y+, y-):

    r_hat in argmax_r  E[ log sigmoid(r(x, y+) - r(x, y-)) ]

Stage 2, a policy that maximises the learned reward without leaving pi_ref (Ouyang et al. 2022):

    pi_rlhf in argmax_pi  E_x[ E_{y ~ pi}[ r_hat(x, y) ] - beta KL(pi(.|x) || pi_ref(.|x)) ]

by PPO (Schulman et al. 2017): a token is an action, the text so far the state. In each step

    1: sample responses y ~ pi_old to a minibatch of prompts
    2: reward them: r_t = -beta log pi_old(y_t|.)/pi_ref(y_t|.), and r_hat(x, y) at the last token
    3: advantages A_t by GAE with the value function V, whitened
    4: for some epochs: maximise  min(ratio_t A_t, clip(ratio_t, 1 - c, 1 + c) A_t)  with
       ratio_t = pi/pi_old, and fit V to the returns

Left out or different: a response without EOS loses --eos-penalty of its reward; the value function
is a network of its own, started from pi_ref; r_hat is clipped to +-R' on request (--reward-clip),
which bounds the optimum's KL by 2R'/beta (Lemma 4.1 of arXiv 2406.01462); learning rates that fall
in a line to 0; no discounting (gamma = 1), no entropy bonus. Of GRPO there are the advantages: a
sample serves one update, so no ratio is clipped, and the KL is charged in the reward.
"""

import argparse
import math
import shutil
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import run
from eval import Evaluator, finish, model_card
from lm import Ids, Scorer

CLIP = 0.2  # c of PPO: how far the ratio may go
VALUE_CLIP = 0.5  # how far a value may go in a step
GAE_LAMBDA = 0.95  # 1 trusts returns, 0 values
WEIGHT_DECAY = 0.1  # AdamW's, of the reward model

# ---- losses and advantages: tensors in, tensors out; (B, T) over response tokens, mask 1 on them

def reward_loss(chosen_scores, rejected_scores):
    """-log sigmoid(r(x, y+) - r(x, y-)), (B,): Bradley-Terry; a shift of r changes nothing.

    >>> reward_loss(torch.zeros(1), torch.zeros(1))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def token_rewards(final_rewards, logratios, mask, beta):
    """(B, T): -beta log pi/pi_ref at every token; the last also gets the final reward, (B,)."""
    rewards = -beta * logratios * mask
    rewards[torch.arange(len(rewards)), mask.sum(1) - 1] += final_rewards
    return rewards


def gae(rewards, values, mask, gae_lambda: float):
    """Generalised advantage estimates (B, T), Schulman et al. 2016, with gamma = 1.

    A_t = delta_t + gae_lambda A_(t+1), delta_t = r_t + V(s_(t+1)) - V(s_t); V is 0 after the last
    token. gae_lambda = 1: return minus value. gae_lambda = 0: delta alone.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        next_advantage = (delta + gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]  # nothing comes out of the padding
        advantages[:, t] = next_advantage
    return advantages


def whiten(x, mask):
    """Mean 0 and mean square 1 over the masked entries, 0 elsewhere; a constant becomes 0."""
    entries = x[mask]  # over padding, the mean would move with the batch's longest response
    deviation = entries.std(unbiased=False)
    varied = deviation > 1e-6 * entries.abs().max()  # what is left of a constant is rounding
    return torch.where(mask & varied, (x - entries.mean()) / deviation, 0.0)


def ppo_loss(logps, old_logps, advantages, clip: float):
    """-min(ratio A, clip(ratio) A), (B, T): no gradient where the ratio has gone far enough."""
    ratio = torch.exp(logps - old_logps)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values, old_values, returns, clip: float):
    """Squared error, (B, T), of the value or of the value within clip of the old: the larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def rloo_advantages(rewards):
    """(N, k) rewards of k samples a prompt -> reward minus the mean of the prompt's others."""
    k = rewards.shape[1]
    if k < 2:
        raise ValueError("leave-one-out needs at least 2 samples a prompt, or there are no others")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def grpo_advantages(rewards):
    """(N, k) rewards of k samples a prompt -> (reward - mean) / standard deviation within the prompt.

    GRPO, Shao et al. 2024, arXiv 2402.03300, section 4.1.2. The expected gradient is no longer that of
    the mean reward: a prompt whose rewards hardly differ counts as much as any other. Of two samples
    one gets 1 and the other -1, so what rises is the rate at which the policy wins against itself.
    """
    k = rewards.shape[1]
    if k < 2:
        raise ValueError("normalising needs at least 2 samples a prompt, or they do not differ")
    gaps = rewards - rewards.mean(1, keepdim=True)
    deviation = gaps.square().mean(1, keepdim=True).sqrt()  # (N, 1)
    varied = deviation > 1e-6 * rewards.abs().amax(1, keepdim=True)  # else it is rounding
    return torch.where(varied, gaps / deviation, 0.0)


# ---- stage 1: the reward model

def train_reward(scorer, pairs, evaluate, args) -> None:
    """Maximise the likelihood of the labels. scorer: lm.Scorer; pairs: lm.Encoded."""
    optimizer = torch.optim.AdamW(
        scorer.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    for step in run.loop(args, scorer, optimizer, evaluate):
        batch = step.minibatch(pairs)
        responses = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
        scores = scorer.final_scores([pair.prompt for pair in batch] * 2, responses)  # (2 B,)
        chosen_scores, rejected_scores = scores.chunk(2)  # (B,), (B,)
        loss = reward_loss(chosen_scores, rejected_scores).mean()

        # update
        loss.backward()
        grad_norm = run.clip(scorer, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        step.log(loss=loss, grad_norm=grad_norm,
                 train_reward_accuracy=(chosen_scores > rejected_scores).float().mean())


def reward_evaluator(start, args):
    """The function evaluate(scorer) -> metrics of a reward model on held-out pairs."""
    pairs, truth = start.held_out, None
    prompts = [pair.prompt for pair in pairs] * 2
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]  # 2 N
    if args.data is None:  # the golden reward of both sides is known
        texts = [[start.ref.decode(ids) for ids in side] for side in (prompts, responses)]
        truth = torch.tensor(start.outcome(*texts))  # (2 N,)

    def evaluate(scorer) -> dict:
        """Accuracy, loss, calibration; and how the two rewards agree, by the golden gap's size."""
        rewards = scorer.predict(prompts, responses)  # (2 N,)
        gap = torch.sub(*rewards.chunk(2))  # (N,) chosen minus rejected
        correct = (gap > 0).float() + 0.5 * (gap == 0).float()
        metrics: dict = {"reward_accuracy": correct.mean().item(),
                   "reward_loss": F.softplus(-gap).mean().item(),
                   "calibration_error": calibration_error(gap)}
        if truth is not None:
            true_gap = torch.sub(*truth.chunk(2)).abs()
            for name, low, high in (("small", 0, 1), ("medium", 1, 3), ("large", 3, math.inf)):
                among = (true_gap > low) & (true_gap <= high)
                metrics[f"reward_accuracy_{name}_gap"] = (
                    correct[among].mean().item() if among.any() else None)
            together = torch.corrcoef(torch.stack([rewards, truth]))[0, 1].item()
            metrics["golden_correlation"] = together if rewards.std() > 0 else 0.0
        return metrics

    return evaluate


def calibration_error(gap: torch.Tensor, bins: int = 5) -> float:
    """Mean |predicted - observed| win frequency, equally filled bins; gap (N,), see evaluate."""
    turned = torch.arange(len(gap)) % 2 == 0  # half of the pairs, or the first would always win
    predicted, observed = torch.where(turned, -gap, gap).sigmoid(), (~turned).float()
    errors = [len(rows) * (predicted[rows].mean() - observed[rows].mean()).abs().item()
              for rows in predicted.argsort().chunk(bins)]
    return sum(errors) / len(gap)


def reward_model(start, args):
    """Stage 1: the judge in args.out/reward/model, trained now."""
    directory = args.out / "reward" / "model"
    steps = max(1, math.ceil(args.reward_epochs * len(start.pairs) / args.batch_size))
    reward_args = argparse.Namespace(**{**vars(args), "out": args.out / "reward", "steps": steps,
                                        "lr": 2 * args.lr, "algorithm": "reward"})
    run.prepare(reward_args, start.inputs())
    with data.to_user("--stage reward"):
        scorer = data.scorer(start.ref, args)
    evaluate = reward_evaluator(start, args)
    train_reward(scorer, start.pairs, evaluate, reward_args)

    # Shift the reward so that pi_ref's mean is 0. The Bradley-Terry loss leaves the shift open, but
    # the clip at R' and the EOS penalty depend on it.
    prompts = [start.prompts[i % len(start.prompts)] for i in range(512)]
    generator = torch.Generator(args.device).manual_seed(run.seed_of(args.seed, "center"))
    prompt_ids, responses, _ = start.ref.respond(prompts, args.max_new_tokens, generator)
    scorer.model.config.reward_center = scorer.predict(prompt_ids, responses).mean().item()
    scorer.model.config.reward_clip = args.reward_clip
    measured = evaluate(scorer)
    with run.touching(directory, "--out"):
        scorer.save(directory, model_card(
            reward_args, "AutoModelForSequenceClassification", "A reward model. The reward is the score "
            "after prompt + response + EOS, read at that EOS, less `reward_center` of config.json: "
            "pi_ref's mean. For a batch in transformers, give model.config a pad_token_id.", measured))
    run.wait()
    print("reward model, held out: " + ", ".join(
        f"{name} {x:.3f}" for name, x in measured.items() if x is not None))
    return data.judge_named(str(directory), args.device)


# ---- stage 2: the policy

class Rollout(NamedTuple):
    """Responses of pi_old to a minibatch of prompts; (B, T) over response tokens."""
    prompts: list[Ids]
    responses: list[Ids]
    mask: torch.Tensor  # (B, T)
    old_logps: torch.Tensor  # (B, T) log pi_old
    rewards: torch.Tensor  # (B, T)
    metrics: dict


def roll_out(policy, ref, prompts, judge, generator, args) -> Rollout:
    """Lines 1 and 2 of the box: one response to each prompt, its log-probs and its rewards."""
    prompt_ids, responses, texts = policy.respond(prompts, args.max_new_tokens, generator)
    judged = torch.tensor(judge(prompts, texts))  # (B,) r_hat
    unfinished = torch.tensor([not policy.ended(ids) for ids in responses]).float()
    finals = (judged - args.eos_penalty * unfinished).to(policy.device)
    with torch.no_grad():  # by the update's own forward pass, so that the first ratio is 1
        old_logps, mask = policy.token_logps(prompt_ids, responses)  # (B, T)
        logratios = old_logps - ref.token_logps(prompt_ids, responses)[0]
    metrics = dict(proxy_reward=judged.mean(), online_kl=logratios.sum(1).mean(),
                   unfinished=unfinished.mean(), tokens=sum(map(len, responses)))
    rewards = token_rewards(finals, logratios, mask, args.beta)
    return Rollout(prompt_ids, responses, mask, old_logps, rewards, metrics)


def train_ppo(policy, ref, prompts, judge, evaluate, args) -> None:
    """Stage 2 by PPO, the box at the top of the file."""
    value = data.scorer(ref, args)
    both = torch.nn.ModuleDict({"policy": policy, "value": value})  # what a checkpoint keeps
    optimizer = torch.optim.AdamW([
        {"params": policy.parameters(), "lr": args.lr},
        {"params": value.parameters(), "lr": 2 * args.lr}], weight_decay=0.0, fused=True)
    for step in run.loop(args, both, optimizer, lambda both: evaluate(policy)):
        # 1, 2: sample responses and reward them
        asked = step.minibatch(prompts)
        rolled = roll_out(policy, ref, asked, judge, step.generator("rollout"), args)

        # 3: advantages
        with torch.no_grad():
            values = value.scores(rolled.prompts, rolled.responses)[0][:, :-1]  # (B, T)
        advantages = gae(rolled.rewards, values, rolled.mask, GAE_LAMBDA)
        returns = advantages + values
        advantages = whiten(advantages, rolled.mask)

        # 4: some epochs on the same responses, in shuffled order and in args.minibatches parts
        shuffle, updates = step.generator("ppo", device="cpu"), []
        orders = [torch.randperm(len(asked), generator=shuffle) for _ in range(args.epochs)]
        for rows in (part for order in orders for part in order.tensor_split(args.minibatches)):
            loss, metrics = ppo_objective(policy, value, rolled, values, advantages, returns, rows)
            loss.backward()
            grad_norm = run.clip(policy, args.max_grad_norm)
            run.clip(value, args.max_grad_norm)  # apart: its errors would shrink the policy's step
            optimizer.step()
            optimizer.zero_grad()
            updates.append({**metrics, "grad_norm": grad_norm})

        means = {name: sum(each[name] for each in updates) / len(updates) for name in updates[0]}
        step.log(**means, first_ratio_error=updates[0]["ratio_error"], **rolled.metrics)


def ppo_objective(policy, value, rolled: Rollout, old_values, advantages, returns, rows):
    """(loss, metrics) of line 4; sums over tokens, for the objective is about whole responses."""
    prompts, responses = [rolled.prompts[i] for i in rows], [rolled.responses[i] for i in rows]
    logps, mask = policy.token_logps(prompts, responses)  # (b, T')
    values = value.scores(prompts, responses)[0][:, :-1]  # (b, T')
    old_logps, old_values, advantages, returns = (  # (b, T')
        x[rows, :mask.shape[1]] for x in (rolled.old_logps, old_values, advantages, returns))
    policy_loss = (ppo_loss(logps, old_logps, advantages, CLIP) * mask).sum() / len(rows)
    critic_loss = (value_loss(values, old_values, returns, VALUE_CLIP) * mask).sum() / len(rows)
    loss, ratio = policy_loss + critic_loss, torch.exp(logps - old_logps).detach()[mask]
    return loss, dict(
        loss=loss.detach(), value_loss=critic_loss.detach(), entropy=-logps.detach()[mask].mean(),
        clip_fraction=((ratio - 1).abs() > CLIP).float().mean(),
        old_to_new_kl=(ratio - 1 - ratio.log()).mean(), ratio_error=(ratio - 1).abs().max())


def train_rloo(policy, ref, prompts, judge, evaluate, args) -> None:
    """Stage 2 without a critic: REINFORCE on sequences, advantages from the prompt's other samples."""
    advantages_of = grpo_advantages if args.grpo else rloo_advantages
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    for step in run.loop(args, policy, optimizer, evaluate):
        # 1, 2: sample k responses to each prompt and reward them
        asked = [prompt for prompt in step.minibatch(prompts) for _ in range(args.k)]
        rolled = roll_out(policy, ref, asked, judge, step.generator("rollout"), args)

        # advantages are formed after the KL is charged: of r_hat - beta log pi/pi_ref
        advantages = advantages_of(rolled.rewards.sum(1).view(-1, args.k))  # (B, k)
        logps = policy.logps(rolled.prompts, rolled.responses).view(-1, args.k)  # (B, k)
        loss = -(advantages * logps).mean()

        # update
        loss.backward()
        grad_norm = run.clip(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        step.log(**rolled.metrics, loss=loss, grad_norm=grad_norm)


# ---- the command

def add_flags(add) -> None:
    """The flags of rlhf.py beside the common ones."""
    add("--stage", choices=["both", "reward", "ppo"], default="both", help="train the reward "
        "model, or the policy on the reward model in --out, or one after the other (default both)")
    add("--reward-epochs", type=run.number(float, 0, 10**5, above=True), default=8, help="passes of "
        "the reward model over the pairs, at twice --lr (default 8)")
    add("--reward-clip", type=run.POSITIVE, help="R': keep the learned reward within +-R', so that the "
        "optimum's KL is at most 2R'/beta (default: not clipped)")
    add("--eos-penalty", type=run.NUMBER, default=1.0, help="off the reward without EOS (default 1)")
    add("--epochs", type=run.COUNT, default=2, help="PPO's passes over a step's responses (default 2)")
    add("--minibatches", type=run.COUNT, default=1, help="minibatches in a pass (default 1)")
    add("--rloo", action="store_true", help="REINFORCE, the baseline the prompt's other samples")
    add("--grpo", action="store_true", help="REINFORCE, advantages normalised within a prompt")
    add("--k", type=run.COUNT, default=4, help="samples a prompt with --rloo or --grpo (default 4)")


def useless(args) -> dict[str, str]:
    """Flags that would have no effect, and why."""
    why: dict[str, str] = {}
    if args.rloo or args.grpo:
        why |= dict.fromkeys(["epochs", "minibatches"], "--rloo and --grpo take one update from their samples")
    else:
        why["k"] = "it is for --rloo and --grpo; PPO takes one sample a prompt"
    if args.judge != "reward":
        why |= dict.fromkeys(["stage", "reward_epochs", "reward_clip"],
                             f"--judge {args.judge} takes the reward model's place")
    elif args.stage == "ppo":
        why |= dict.fromkeys(["reward_epochs", "reward_clip"], "the reward model is there already")
    elif args.stage == "reward":
        why |= dict.fromkeys(["steps", "beta", "rloo", "grpo", "k", "epochs", "minibatches", "eos_penalty"],
                             "--stage reward trains no policy")
    return why


def with_reward_model(start, args):
    """start, with the reward model that --stage ppo finds in --out as its judge.

    What cannot work is refused here, before an earlier run is moved aside.
    """
    if args.judge == "reward" or not (args.rloo or args.grpo):
        with data.to_user(f"--model {args.model}"):
            Scorer.of(start.ref)  # reward model and value function are made so
    if args.stage != "ppo":
        return start
    directory = args.out / "reward" / "model"
    if not directory.is_dir():
        raise run.UserError(f"--stage ppo: there is no reward model in {directory}; run --stage "
                            "reward with this --out first, or name another --judge")
    return start._replace(label=data.judge_named(str(directory), args.device, "--stage ppo:"))


def main(argv=None, begin=data.start):
    """The command. begin: args -> data.Start; the studies begin with pairs of their own."""
    parser, add = run.parser(__doc__, beta=run.NUMBER)
    add_flags(add)
    parser.set_defaults(judge="reward")
    args = run.parse(parser, argv, lambda args: (
        "rloo" if args.rloo else "grpo" if args.grpo else "ppo"), useless, tiny_lr=4e-3)
    if args.rloo and args.grpo:
        parser.error("--rloo and --grpo are two ways to the advantages; give one")
    if args.algorithm != "ppo" and args.k < 2:
        parser.error(f"--{args.algorithm} needs --k of at least 2, got {args.k}")
    if args.minibatches > args.batch_size:
        parser.error(f"--minibatches {args.minibatches} is more than --batch-size "
                     f"{args.batch_size}: some would be empty")
    if args.judge == "none":
        parser.error("--judge none rewards nothing; leave --judge out, or name a judge")

    with run.working(args):
        start = with_reward_model(begin(args), args)  # pi_ref, pairs, prompts, judges
        earlier = run.prepare(args, start.inputs())
        judge = start.label if args.stage == "ppo" or args.judge != "reward" else reward_model(start, args)
        if args.stage == "ppo" and earlier:  # the reward model stays with this run, too
            shutil.copytree(earlier / "reward", args.out / "reward")
        if args.judge == "reward":  # its name, in summary.json, is relative to --out
            judge = judge._replace(name="reward/model")
        if args.stage == "reward":
            return
        if not start.outcome:  # pairs of a file: what was learned from them measures, too
            start = start._replace(outcome=judge, samples=None)
        train = train_ppo if args.algorithm == "ppo" else train_rloo
        train(start.policy, start.ref, start.prompts, judge, Evaluator(start, args), args)
        summary = finish(start, args)  # policy/, summary.json, curve.png
        if summary and args.reward_clip and args.beta > 0:
            bound = 2 * args.reward_clip / args.beta
            print(f"KL {summary['reverse_kl']:.2f} nats; Lemma 4.1 bounds the KL of the learned "
                  f"reward's optimum by 2R'/beta = {bound:.1f} (without the EOS penalty)")


if __name__ == "__main__":
    run.start(main)

"""RLHF in its two classical stages: a reward model by maximum likelihood, then KL-regularised PPO.

    python rlhf.py                                     # both stages on 400 pairs of the built-in world
    python rlhf.py --pairs 2000                        # a better reward model
    python rlhf.py --beta 0 --out runs/hacked          # no KL term: watch the policy hack the reward model
    python rlhf.py --rloo                              # no critic: REINFORCE with a leave-one-out baseline
    python dpo.py --sampling online --judge runs/ppo/reward    # the reward model serves as a judge

Stage 1, Bradley-Terry maximum likelihood on preference pairs (x, y+, y-):

    r_hat in argmax_r  E[ log sigmoid(r(x, y+) - r(x, y-)) ]

Stage 2, a policy that maximises the learned reward without leaving pi_ref (Ouyang et al. 2022):

    pi_rlhf in argmax_pi  E_x[ E_{y ~ pi}[ r_hat(x, y) ] - beta KL(pi(.|x) || pi_ref(.|x)) ]

by PPO (Schulman et al. 2017): every token is an action, the state is the text so far, the KL is charged token by
token, and r_hat is paid at the last token. In each step

    1: sample responses y ~ pi_old to a minibatch of prompts
    2: reward them: r_t = -beta log pi_old(y_t|.)/pi_ref(y_t|.), and r_hat(x, y) more at the last token
    3: advantages A_t by GAE with the value function V, whitened
    4: for some epochs: maximise  min(ratio_t A_t, clip(ratio_t, 1 - c, 1 + c) A_t),  ratio_t = pi/pi_old,
       and fit V to the returns

Left out or different: the value function is a network of its own, started from pi_ref; r_hat is clipped to
+-R' on request (--reward-clip), which bounds the optimum's KL by 2R'/beta (Lemma 4.1 of arXiv 2406.01462); no
discounting (gamma = 1), no entropy bonus, no learning-rate schedule.
"""

import argparse
import math
import shutil

import torch
import torch.nn.functional as F

import data
import lm
import run
from eval import evaluator, finish, model_card
from judges import load_judge
from task import set_up

# ---------------------------------------------------------------------------------------------------
# losses and advantages: tensors in, tensors out; (B, T) over response tokens, mask 1 on them


def reward_loss(chosen_scores, rejected_scores):
    """-log sigmoid(r(x, y+) - r(x, y-)), (B,): the Bradley-Terry likelihood; a shift of r changes nothing.

    >>> reward_loss(torch.zeros(1), torch.zeros(1))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def token_rewards(final_rewards, logratios, mask, beta):
    """(B, T): -beta log pi/pi_ref at every token, and the response's reward (B,) more at its last one."""
    rewards = -beta * logratios * mask
    rewards[torch.arange(len(rewards)), mask.sum(1) - 1] += final_rewards
    return rewards


def gae(rewards, values, mask, gae_lambda: float):
    """Generalised advantage estimates (B, T), Schulman et al. 2016, with gamma = 1.

    A_t = delta_t + gae_lambda A_(t+1), delta_t = r_t + V(s_(t+1)) - V(s_t); V is 0 after the last token.
    gae_lambda = 1: return minus value. gae_lambda = 0: delta alone.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        next_advantage = (delta + gae_lambda * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages


def whiten(x, mask):
    """Mean 0 and mean square 1 over the masked entries, 0 elsewhere; a constant becomes 0."""
    entries = x[mask]
    deviation = entries.std(unbiased=False)
    varied = deviation > 1e-6 * entries.abs().max()  # what is left of a constant is rounding
    return torch.where(mask & varied, (x - entries.mean()) / deviation, 0.0)


def ppo_loss(logps, old_logps, advantages, clip: float):
    """-min(ratio A, clip(ratio) A), (B, T): no gradient where the ratio has already gone far enough."""
    ratio = torch.exp(logps - old_logps)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values, old_values, returns, clip: float):
    """Squared error, (B, T), of the value or of the value kept within clip of the old one: the larger."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def rloo_advantages(rewards):
    """(N, k) rewards of k samples a prompt -> reward minus the mean of the prompt's other samples."""
    k = rewards.shape[1]
    if k < 2:
        raise ValueError("--rloo needs --k of at least 2: with one sample there are no others to compare with")
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


# ---------------------------------------------------------------------------------------------------
# stage 1: the reward model


def reward_evaluator(pairs: list[dict], texts: list[dict], golden: bool):
    """The function evaluate(scorer) -> metrics of a reward model on held-out pairs.

    pairs: token ids; texts: the same pairs as texts. golden: whether the golden reward knows them, which
    gives the accuracy by the size of the golden gap, and the correlation of the two rewards.
    """
    prompts = [pair["prompt"] for pair in pairs] * 2
    responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    truth = torch.tensor(data.golden_judge([text["prompt"] for text in texts] * 2, [
        text[side] for side in ("chosen", "rejected") for text in texts])) if golden else None

    def evaluate(scorer) -> dict:
        rewards = predict(scorer, prompts, responses)
        gap = torch.sub(*rewards.chunk(2))  # (N,) chosen minus rejected
        correct = (gap > 0).float() + 0.5 * (gap == 0).float()
        metrics = {"reward_accuracy": correct.mean().item(), "reward_loss": F.softplus(-gap).mean().item(),
                   "calibration_error": calibration_error(gap)}
        if golden:
            true_gap = torch.sub(*truth.chunk(2)).abs()
            for name, low, high in (("small", 0, 1), ("medium", 1, 3), ("large", 3, math.inf)):
                among = (true_gap > low) & (true_gap <= high)
                metrics[f"reward_accuracy_{name}_gap"] = correct[among].mean().item()
            moved = rewards.std() > 0
            metrics["golden_correlation"] = torch.corrcoef(torch.stack([rewards, truth]))[0, 1].item() if moved else 0.0
        return metrics

    return evaluate


def calibration_error(gap: torch.Tensor, bins: int = 5) -> float:
    """Mean |predicted - observed| frequency with which a fixed side wins, over equally filled bins of pairs.

    gap: (N,) predicted reward of the chosen response minus the rejected. Half of the pairs are turned round,
    or the observed side would always be the winner.
    """
    turned = torch.arange(len(gap)) % 2 == 0
    predicted, observed = torch.where(turned, -gap, gap).sigmoid(), (~turned).float()
    order = predicted.argsort()
    errors = [len(b) * (predicted[b].mean() - observed[b].mean()).abs().item() for b in order.chunk(bins)]
    return sum(errors) / len(gap)


@torch.no_grad()
def predict(scorer, prompts, responses, batch_size: int = 128) -> torch.Tensor:
    """(N,) final scores, batch by batch, on the CPU."""
    return torch.cat([lm.final_scores(scorer, prompts[i:i + batch_size], responses[i:i + batch_size]).cpu()
                      for i in range(0, len(prompts), batch_size)])


def train_reward(scorer, pairs: list[dict], evaluate, args) -> None:
    """Stage 1: maximise the likelihood of the labels."""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    for step, metrics in run.loop(args, scorer, optimizer, evaluate):
        batch = run.minibatch(pairs, args, step)
        prompts = [pair["prompt"] for pair in batch]
        chosen, rejected = lm.final_scores(scorer, prompts * 2, [pair["chosen"] for pair in batch] + [
            pair["rejected"] for pair in batch]).chunk(2)  # (B,), (B,)
        loss = reward_loss(chosen, rejected).mean()
        metrics.update(loss=loss.detach(), grad_norm=run.update(scorer, optimizer, loss, args),
                       train_reward_accuracy=(chosen > rejected).float().mean())


# ---------------------------------------------------------------------------------------------------
# stage 2: the policy


def roll_out(policy, ref, tokenizer, prompts: list[str], judge, beta, args, step: int) -> dict:
    """Lines 1 and 2: one response to each prompt, with log-probs, rewards (B, T) and what is worth logging."""
    prompt_ids = [lm.encode_prompt(tokenizer, prompt) for prompt in prompts]
    responses = lm.sample(policy, prompt_ids, args.max_new_tokens, tokenizer.eos_token_id,
                          run.generator(args, "rollout", step))
    judged = torch.tensor(judge(prompts, [lm.decode(tokenizer, response) for response in responses]))  # (B,)
    unfinished = torch.tensor([response[-1] != tokenizer.eos_token_id for response in responses]).float()
    final_rewards = (judged - args.eos_penalty * unfinished).to(policy.device)
    with torch.no_grad():  # by the same forward pass as the update's, so that the first ratio is 1
        old_logps, mask = lm.token_logps(policy, prompt_ids, responses)
        logratios = old_logps - lm.token_logps(ref, prompt_ids, responses)[0]
    return dict(prompts=prompt_ids, responses=responses, old_logps=old_logps, mask=mask, final_rewards=final_rewards,
                rewards=token_rewards(final_rewards, logratios, mask, beta),
                metrics=dict(proxy_reward=judged.mean(), online_kl=logratios.sum(1).mean(), beta=beta,
                             unfinished=unfinished.mean(), tokens=sum(map(len, responses))))


def train_ppo(policy, ref, tokenizer, prompts: list[str], judge, evaluate, args) -> None:
    """Stage 2 by PPO; the comments number the lines of the box at the top of the file."""
    value = lm.fit_in_memory(lm.make_scorer(ref), args)
    trained = torch.nn.ModuleDict({"policy": policy, "value": value})  # one optimizer, one checkpoint
    trained.register_buffer("beta", torch.tensor(args.beta, device=args.device))
    optimizer = torch.optim.AdamW([{"params": policy.parameters(), "lr": args.lr},
                                   {"params": value.parameters(), "lr": args.value_lr}], weight_decay=0.0, fused=True)
    for step, metrics in run.loop(args, trained, optimizer, lambda trained: evaluate(policy)):
        # 1, 2: sample responses and reward them
        asked = run.minibatch(prompts, args, step)
        rolled = roll_out(policy, ref, tokenizer, asked, judge, trained.beta.item(), args, step)
        mask = rolled["mask"]  # (B, T)

        # 3: advantages
        with torch.no_grad():
            rolled["old_values"] = lm.scores(value, rolled["prompts"], rolled["responses"])[0][:, :-1]  # (B, T)
        advantages = gae(rolled["rewards"], rolled["old_values"], mask, args.gae_lambda)
        rolled["returns"] = advantages + rolled["old_values"]
        rolled["advantages"] = whiten(advantages, mask)

        # 4: some epochs of minibatches on the same responses
        generator, updates = torch.Generator().manual_seed(run.seed_of(args.seed, "ppo", step)), []
        for _ in range(args.epochs):
            for rows in torch.randperm(len(asked), generator=generator).chunk(args.minibatches):
                loss, measured = ppo_objective(policy, value, rolled, rows, args)
                measured["grad_norm"] = run.update(policy, optimizer, loss, args, value)
                updates.append(measured)
        metrics.update({key: sum(update[key] for update in updates) / len(updates) for key in updates[0]},
                       first_ratio_error=updates[0]["ratio_error"], **rolled["metrics"])
        if args.target_kl:
            trained.beta.copy_(adapted_beta(trained.beta, metrics["online_kl"], args.target_kl))


def ppo_objective(policy, value, rolled: dict, rows: torch.Tensor, args):
    """(loss, metrics) of line 4 on some of the rolled-out responses; sums over tokens, means over responses."""
    prompts, responses = ([rolled[side][i] for i in rows] for side in ("prompts", "responses"))
    logps, mask = lm.token_logps(policy, prompts, responses)  # (b, T)
    values = lm.scores(value, prompts, responses)[0][:, :-1]  # (b, T)
    old_logps, old_values, advantages, returns = (
        rolled[name][rows, :mask.shape[1]] for name in ("old_logps", "old_values", "advantages", "returns"))
    policy_loss = (ppo_loss(logps, old_logps, advantages, args.clip) * mask).sum() / len(rows)
    critic_loss = (value_loss(values, old_values, returns, args.value_clip) * mask).sum() / len(rows)
    ratio = torch.exp(logps - old_logps).detach()[mask]
    return policy_loss + critic_loss, dict(
        loss=(policy_loss + critic_loss).detach(), value_loss=critic_loss.detach(),
        entropy=-logps.detach()[mask].mean(), clip_fraction=((ratio - 1).abs() > args.clip).float().mean(),
        old_to_new_kl=(ratio - 1 - ratio.log()).mean(), ratio_error=(ratio - 1).abs().max())


def adapted_beta(beta, kl, target: float):
    """Ziegler et al. 2019: beta moves by at most 2 % towards the KL (nats a sequence) that is wanted."""
    return beta * (1 + 0.1 * ((kl - target) / target).clamp(-0.2, 0.2))


def train_rloo(policy, ref, tokenizer, prompts: list[str], judge, evaluate, args) -> None:
    """Stage 2 without a critic: REINFORCE on sequences, the baseline being the prompt's other samples."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    for step, metrics in run.loop(args, policy, optimizer, evaluate):
        asked = [prompt for prompt in run.minibatch(prompts, args, step) for _ in range(args.k)]
        rolled = roll_out(policy, ref, tokenizer, asked, judge, args.beta, args, step)
        rewards = rolled["rewards"].sum(1).view(-1, args.k)  # (B, k): r_hat - beta log pi/pi_ref
        logps = lm.logps(policy, rolled["prompts"], rolled["responses"]).view(-1, args.k)
        loss = -(rloo_advantages(rewards) * logps).mean()
        metrics.update(rolled["metrics"], loss=loss.detach(), grad_norm=run.update(policy, optimizer, loss, args))


# ---------------------------------------------------------------------------------------------------
# the command


def add_arguments(parser) -> None:
    """The flags of rlhf.py beside the common ones."""
    add = parser.add_argument_group("rlhf.py").add_argument
    add("--stage", choices=["both", "reward", "ppo"], default="both", help="train the reward model, or the policy on "
        "the reward model in --out, or one after the other (default both)")
    add("--reward-epochs", type=float, default=8, help="passes of the reward model over the pairs (default 8)")
    add("--reward-lr", type=float, help="learning rate of the reward model (default: twice --lr)")
    add("--weight-decay", type=float, default=0.1, help="AdamW's weight decay of the reward model (default 0.1)")
    add("--reward-clip", type=float, help="R': keep the learned reward within +-R', so that the optimum's KL is at "
        "most 2R'/beta (default: not clipped)")
    add("--eos-penalty", type=float, default=1.0, help="taken off the reward of a response without EOS (default 1)")
    add("--gae-lambda", type=float, default=0.95, help="lambda of GAE: 1 trusts returns, 0 values (default 0.95)")
    add("--clip", type=float, default=0.2, help="c of PPO: how far the ratio may go (default 0.2)")
    add("--value-clip", type=float, default=0.5, help="how far a value may go in a step (default 0.5)")
    add("--value-lr", type=float, help="learning rate of the value function (default: twice --lr)")
    add("--epochs", type=int, default=2, help="PPO's passes over a step's responses (default 2)")
    add("--minibatches", type=int, default=1, help="minibatches in a pass (default 1)")
    add("--target-kl", type=float, help="adapt beta until the KL is this, nats a sequence (default: beta is fixed)")
    add("--rloo", action="store_true", help="no critic: REINFORCE, baseline the prompt's other samples")
    add("--k", type=int, default=4, help="samples a prompt with --rloo (default 4)")


def stage_1(args, ref, tokenizer, respond, pairs, prompts, held_out, held_out_texts) -> None:
    """Train the reward model and leave it in args.out/model, centred on pi_ref's samples."""
    scorer = lm.fit_in_memory(lm.make_scorer(ref), args)
    args = argparse.Namespace(**{**vars(args), "out": args.out / "reward", "lr": args.reward_lr, "steps": max(
        1, math.ceil(args.reward_epochs * len(pairs) / args.batch_size))})
    run.prepare(args, "reward")
    evaluate = reward_evaluator(held_out, held_out_texts, golden=args.data is None)
    train_reward(scorer, pairs, evaluate, args)

    # pi_ref's mean reward becomes 0; the loss does not see a shift, but a clip and an EOS penalty do
    prompts = [prompts[i % len(prompts)] for i in range(512)]
    _, samples = respond(prompts, run.seed_of(args.seed, "center"))
    prompt_ids = [lm.encode_prompt(tokenizer, prompt) for prompt in prompts]
    scorer.config.reward_center = predict(scorer, prompt_ids, samples).mean().item()
    scorer.config.reward_clip = args.reward_clip
    measured = evaluate(scorer)
    lm.save(scorer, tokenizer, args.out / "model", model_card(
        args, "A reward model. The reward is the score after prompt + response + EOS, read at that EOS, less "
        "`reward_center` of config.json: pi_ref's mean.", measured))
    print("reward model, held out: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))


def main(argv=None):
    parser = run.parser(__doc__)
    add_arguments(parser)
    parser.set_defaults(judge="reward", steps=120, eval_every=20)
    args = run.parse(parser, argv, may_be_zero=("beta",))
    if args.beta < 0:
        parser.error(f"--beta must not be negative, got {args.beta}")
    if args.rloo and args.k < 2:
        parser.error(f"--rloo needs --k of at least 2, got {args.k}")
    args.reward_lr = args.reward_lr or 2 * args.lr
    args.value_lr = args.value_lr or 2 * args.lr

    with run.precision(args):
        s = set_up(args)
        earlier = run.prepare(args, "rloo" if args.rloo else "ppo")
        if args.stage == "ppo" and earlier and (earlier / "reward").is_dir():
            shutil.copytree(earlier / "reward", args.out / "reward")  # another stage 2 on the same reward model
        if args.stage != "ppo" and args.judge == "reward":
            stage_1(args, s.ref, s.tokenizer, s.respond, s.pairs, s.prompts, s.held_out, s.held_out_texts)
        if args.stage == "reward":
            return
        learned = args.out / "reward" / "model"
        if args.judge == "reward" and not learned.is_dir():
            raise ValueError(f"--stage ppo: there is no reward model in {learned}; run --stage reward with this --out "
                             "first, or name another judge")
        judge = load_judge(str(learned), args.device) if args.judge == "reward" else s.label
        evaluate = evaluator(args, s.ref, s.tokenizer, s.held_out_prompts, s.held_out, s.outcome or judge, s.second)
        (train_rloo if args.rloo else train_ppo)(s.policy, s.ref, s.tokenizer, s.prompts, judge, evaluate, args)
        summary = finish(args, s.policy, s.tokenizer, run.seconds(args))
        if args.reward_clip and args.beta > 0:
            print(f"KL {summary['reverse_kl']:.2f} nats; Lemma 4.1 bounds the KL of the learned reward's optimum by "
                  f"2R'/beta = {2 * args.reward_clip / args.beta:.1f}")


if __name__ == "__main__":
    run.start(main)

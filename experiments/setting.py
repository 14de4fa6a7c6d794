"""The controlled setting of Tang et al. 2024 (arXiv 2405.08448, section 3), and what a run in it starts from.

The golden reward of world.py plays the human. It labels the offline pairs D_golden, two samples of pi_ref a
prompt: the larger reward always wins. From the same pairs

    offline   the policy learns directly;
    online    a proxy reward model learns, which labels pairs that the policy samples as it goes.

So both arms know the same labels. A policy is measured by its win rate against the golden baseline, and beside it
against pi_ref; both opponents are distributions, of 65,536 samples that are drawn once (`golden_weights`).

Different from the paper: the golden baseline is the exact optimum of the golden reward at b = 1, where the paper
trains one; the proxy is a reward model instead of a pairwise one, scored once a response; and a seed changes pairs
and proxy, where the paper has one of each. In a second setting labels are drawn from Bradley-Terry, and in a second
world what a word is worth depends on the words before it (`fitting_reward`).

The training is that of hypo.py, dpo.py and rlhf.py. A run here is their command, started from `begin` below.
"""

import argparse
import dataclasses
import json
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch

import data
import dpo
import hypo
import rlhf
import run
import world
from eval import frontier, implicit_reward_metrics, quantile, read_summary
from judges import implicit_rewards, logps_of
from lm import LM, Encoded

# ---------------------------------------------------------------------------------------------------
# runs

@dataclasses.dataclass(frozen=True)
class Run:
    """One job of a seed, most often a training run; the defaults are what most runs share."""
    algorithm: str  # ipo, dpo, bo2, hypo or ppo; or setting, or classify
    source: str = "offline"  # of ipo, dpo and bo2: offline, online, iterative; or replay, of the online run's pairs
    beta: float = 0.1
    lr: float = 1.0  # in units of the study's learning rate
    data: str = "golden"  # which offline pairs: see make_pairs
    labels: str = "sign"  # of D_golden: the sign of the golden preference, or drawn from bradley-terry
    world: str = "additive"  # or fitting: whose golden reward
    judge: str = "proxy"  # who labels online pairs: proxy; implicit: the offline policy's log-ratio
    lam: float = 0.0  # HyPO's
    rounds: int = 0  # of an iterative run: all together see as many pairs as an online run
    window: int = 1  # replay: pairs are shuffled within windows of this many steps; 0: all of them
    width: int = 0  # of the policy; 0: the model that --model names
    steps: float = 1.0  # share of the study's steps
    pairs: float = 1.0  # share of the study's offline pairs

    @property
    def name(self) -> str:
        """Its directory, and its key in results/*.json: algorithm, source, and what differs from the defaults."""
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)[2:]]
        changed = [f"{field.name}-{value:g}" if isinstance(value, (int, float)) else f"{field.name}-{value}"
                   for field, value in values if value != field.default]
        return "-".join([self.algorithm, *[self.source] * bool(self.source), *changed])

    @property
    def label(self) -> str:
        """The algorithm's name in tables and pictures."""
        return self.algorithm if self.source == "offline" else f"{self.source} {self.algorithm}"


EARLY = Run("ipo", "online", steps=0.2)  # an online policy of few steps
FINAL = Run("ipo", "online")
OFFLINE = Run("ipo")
SIDES = {"early": EARLY, "final": FINAL}  # whose samples may be a side of offline pairs
CLASSIFY = Run("classify", "")
SAMPLES = 128  # of pi_ref for each evaluated response: 65,536, so that the 0.1 % quantile is known to half a nat
SAMPLES_PRETRAINED = 16  # the same of a model that is not tiny
LIKELY = 0.1  # likely pairs leave out what is under this quantile of log pi_ref


def setting_of(job: Run) -> Run:
    """The job that makes the pairs and the proxy of a run; its rate was chosen on seed 1000 by held-out accuracy."""
    return Run("setting", "", lr=4.0 if job.pairs < 1 else 2.0, labels=job.labels, world=job.world, pairs=job.pairs)


def needs(seed: int, job: Run) -> list[tuple[int, Run]]:
    """The jobs that must be finished before this one."""
    if job.algorithm == "setting":
        return []
    if job == CLASSIFY:
        return [(seed, FINAL), (seed, OFFLINE)]
    found = [setting_of(job), *[OFFLINE] * (job.judge == "implicit")]
    if job.source == "replay":
        found.append(dataclasses.replace(job, source="online", window=1))
    found += [policy for name, policy in SIDES.items() if name in job.data]
    return [(seed, needed) for needed in found]


# ---------------------------------------------------------------------------------------------------
# what jobs do: folder is the seed's directory, argv a command line

def make_setting(job: Run, argv: list[str], out: Path) -> dict:
    """D_golden, held-out pairs, the best unseen responses, and the proxy: stage 1 of rlhf.py on D_golden."""
    def begin_setting(args):
        policy, golden = load_ref(job, args), GOLDEN_JUDGES[job.world]
        ref = policy.frozen_copy()
        prompts, held_out_prompts = world.world_prompts()
        pairs, held_out = (data.add_ref_logps(ref, data.collect(
            responder(ref, args), asked, n, seed, golden, sure=job.labels == "sign"))
            for asked, n, seed in ((prompts, args.pairs, args.seed),
                                   (held_out_prompts, args.eval_samples // 2, args.seed + 10**6)))
        unseen = data.add_ref_logps(ref, best_unseen(ref, pairs[:args.eval_samples // 4], golden, args))
        for kind, made in (("pairs", pairs), ("held_out", held_out), ("best", unseen)):
            data.write_pairs(pairs_file(args.out, kind), made)
        best.extend(frontiers(samples_of(args, ref, golden)))
        return data.Start(policy, ref, pairs, prompts, held_out, held_out_prompts, None, golden, None)

    best: list[tuple[float, dict]] = []
    rlhf.main([*argv, "--stage", "reward"], begin_setting)
    learned = run.read_rows(out / "reward" / "metrics.jsonl")[-1]
    return {"frontier": best, **{name: learned[name] for name in ("reward_accuracy", "golden_correlation")}}


def pairs_file(out: Path, kind: str = "pairs") -> Path:
    """Where a job's pairs are: beside its directory, in which only runs write."""
    return out.with_name(f"{out.name}.{kind}.jsonl")


def best_unseen(policy: LM, asked: list[Encoded], golden: world.Judge, args, n: int = 32) -> list[Encoded]:
    """For each pair the best of n samples of pi_ref that are not in it, beside its chosen response."""
    best, prompts = [], [policy.decode(pair.prompt) for pair in asked]
    generator = torch.Generator(args.device).manual_seed(run.seed_of(args.seed, "best"))
    _, ids, texts = policy.respond(prompts * n, args.max_new_tokens, generator)
    rewards = golden(prompts * n, texts)
    for i, pair in enumerate(asked):
        seen = policy.decode(pair.chosen), policy.decode(pair.rejected)
        _, j = max((rewards[j], j) for j in range(i, len(texts), len(asked)) if texts[j] not in seen)
        best.append(Encoded(pair.prompt, ids[j], pair.chosen))
    return best


def train(job: Run, argv: list[str], folder: Path) -> None:
    """A training run, by the algorithm's own main."""
    start = partial(begin, job, folder)
    if job.algorithm == "hypo":
        hypo.main(argv, start)
    elif job.algorithm == "ppo":
        rlhf.main(argv, start)
    else:
        online = dataclasses.replace(job, source="online", window=1)
        dpo.main(argv, start, {"online": recorded, "replay": partial(
            replay, folder / online.name / "stream.jsonl", job.window)}.get(job.source))


def begin(job: Run, folder: Path, args) -> data.Start:
    """What a run of the setting starts from, in place of data.start."""
    policy, setting, judge = load_ref(job, args), folder / setting_of(job).name, GOLDEN_JUDGES[job.world]
    ref = policy.frozen_copy()
    golden, held_out, best = (data.read_pairs(pairs_file(setting, kind)) for kind in ("pairs", "held_out", "best"))
    if job.width:  # another pi_ref
        golden, held_out, best = (data.add_ref_logps(ref, pairs) for pairs in (golden, held_out, best))
    prompts, held_out_prompts = world.world_prompts()
    samples = samples_of(args, ref, judge)
    proxy = label = data.judge_named(str(setting / "reward" / "model"), args.device)
    if job.judge == "implicit":
        offline = policy_of(OFFLINE, folder, args)
        label = world.Judge("implicit", implicit_rewards(offline, ref, OFFLINE.beta, args.max_new_tokens))
    pairs = golden
    if job.data != "golden":
        pairs = data.add_ref_logps(ref, make_pairs(job, ref, samples, folder, args))
        data.write_pairs(pairs_file(args.out), pairs)
    if job.rounds:  # a round asks for as many pairs as there are offline
        pairs = list(islice(cycle(golden), args.steps * args.batch_size // job.rounds))
    return data.Start(policy, ref, pairs, prompts, held_out, held_out_prompts, label, judge, None, samples,
                      measures(golden[:256], best, samples, proxy, len(held_out_prompts)))


def samples_of(args, ref: LM, judge: world.Judge) -> list[dict]:
    """pi_ref's samples to the held-out prompts, with which a study's evaluations compare."""
    n = SAMPLES if args.model == "tiny" else SAMPLES_PRETRAINED
    return data.samples_of(args, ref, world.world_prompts()[1], judge, None, n * args.eval_samples)


def load_ref(job: Run, args) -> LM:
    """pi_ref: the model that --model names, or the built-in one in another width."""
    if args.model != "tiny" and not job.width:
        return data.load_policy(args, args.model)
    return data.load_policy(args, str(data.tiny_directory(args.device, width=job.width or data.TINY["width"])))


def policy_of(job: Run, folder: Path, args) -> LM:
    """The policy that a finished run left."""
    return data.load_policy(args, str(folder / job.name / "policy"))


def args_of(job: Run, folder: Path) -> argparse.Namespace:
    """The arguments of a finished run."""
    return argparse.Namespace(**read_summary(folder / job.name)["settings"])


# ---------------------------------------------------------------------------------------------------
# the second world, pairs of other kinds, another judge, and further measures

def fitting_reward(prompt: str, response: str) -> float:
    """The golden reward of the second world: 3 more for each opinion that fits the one before it, 3 less if not.

    Two opinions fit if both are good or both are bad; after "but", if one is good and one is bad.

    >>> fitting_reward("The plot was", " superb, but the music felt dull.")
    4.0
    >>> fitting_reward("The plot was", " superb, and the music felt dull.")
    -2.0
    """
    reward, before, sign, joint = world.golden_reward(prompt, response), 0, 1, ""
    for word in map(str.lower, world.WORD.findall(response)):
        if word in world.CLAUSE_BREAKS:
            sign, joint = 1, word
        elif word in world.NEGATIONS:
            sign = -sign
        elif opinion := sign * world.VALENCE.get(word, 0):
            if before:
                reward += 3 if (before * opinion > 0) != (joint == "but") else -3
            before = opinion
    return max(-world.REWARD_BOUND, min(world.REWARD_BOUND, reward))


GOLDEN_JUDGES = {"additive": world.golden_judge, "fitting": world.Judge(
    "fitting", lambda prompts, texts: [fitting_reward(x, y) for x, y in zip(prompts, texts, strict=True)])}


def responder(policy: LM, args):
    """The policy as a function (prompts, seed) -> (prompt ids, response ids, texts)."""
    def respond(prompts, seed: int):
        return policy.respond(prompts, args.max_new_tokens, torch.Generator(args.device).manual_seed(seed))
    return respond


def make_pairs(job: Run, ref: LM, samples: list[dict], folder: Path, args) -> list[Encoded]:
    """The offline pairs that a run learns from, of the kind job.data; the golden preference labels all kinds.

    final-final, sft-early, early-final: the sides come from pi_ref (sft), from an online policy of few steps (early)
    and from the online policy (final). likely: both sides come from pi_ref, but for the least likely tenth.
    """
    respond = responder(ref, args)

    def likely(prompts, seed: int):
        floor = quantile([row["logp"] for row in samples], LIKELY)
        prompt_ids, ids, texts = respond(prompts, seed)
        while again := [i for i, logp in enumerate(logps_of(ref, prompt_ids, ids)) if logp < floor]:
            seed = run.seed_of(seed, "again")
            _, new_ids, new_texts = respond([prompts[i] for i in again], seed)
            for i, new, text in zip(again, new_ids, new_texts):
                ids[i], texts[i] = new, text
        return prompt_ids, ids, texts

    def two_sided(prompts, seed: int):  # data.collect asks for all first responses, then for all second ones
        half = len(prompts) // 2
        first, second = sides[0](prompts[:half], seed), sides[1](prompts[half:], run.seed_of(seed, "second"))
        return [a + b for a, b in zip(first, second)]

    if job.data != "likely":
        sides = [respond if side == "sft" else responder(policy_of(SIDES[side], folder, args), args)
                 for side in job.data.split("-")]
    return data.collect(likely if job.data == "likely" else two_sided, world.world_prompts()[0], args.pairs,
                        args.seed, GOLDEN_JUDGES[job.world], sure=job.labels == "sign")


def golden_weights(samples: list[dict], n_prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The golden baseline: (rewards, weights), (n_prompts, m) each, of pi_ref's samples to each prompt.

    It is the optimum of V - KL for the golden reward, pi_ref(y|x) exp(r(x, y)) / Z(x): pi_ref's own samples, weighted.
    """
    rewards = torch.tensor([row["reward"] for row in samples], dtype=torch.float64).view(-1, n_prompts).T
    return rewards, rewards.softmax(1)


def frontiers(samples: list[dict]) -> list[tuple[float, dict]]:
    """(KL, win rates) of the best policies, see eval.frontier: against pi_ref and against the golden baseline."""
    rewards = [row["reward"] for row in samples]
    return [(kl, {"win_rate": rate, "golden_win_rate": golden_rate})
            for (kl, rate, _), (_, golden_rate, _) in zip(frontier(rewards), frontier(rewards, opponent=1))]


def measures(pairs: list[Encoded], best: list[Encoded], samples: list[dict], proxy, n_prompts: int):
    """The function (policy, evaluated rows) -> metrics that the studies add to every evaluation.

    golden_win_rate, golden_reward      against the golden baseline; the mean, under one name in both worlds
    good                                share of responses of golden reward 4 or more, of at most 5
    sampled_proxy_reward                mean reward by the proxy, where golden_reward is by the golden one
    unlikely                            share of responses among the tenth that pi_ref is least likely to write
    data_accuracy, data_chosen_logratio, data_rejected_logratio     on pairs of D_golden, as labelled
    best_logratio                       log-ratio of good responses that are not in D_golden

    pairs: of D_golden; best: of best_unseen; samples: pi_ref's.
    """
    theirs, weights = golden_weights(samples, n_prompts)
    floor = quantile([row["logp"] for row in samples], LIKELY)

    def more(policy, rows: list[dict]) -> dict:
        n, texts = len(rows), [row["response"] for row in rows]
        rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)  # (n,)
        asked = torch.arange(n) % n_prompts
        wins = ((rewards[:, None] > theirs[asked]) + 0.5 * (rewards[:, None] == theirs[asked])) * weights[asked]
        on_data = implicit_reward_metrics(policy, pairs)
        return {"golden_win_rate": wins.sum().item() / n, "golden_reward": rewards.mean().item(),
                "good": (rewards >= 4).double().mean().item(),
                "sampled_proxy_reward": sum(proxy([row["prompt"] for row in rows], texts)) / n,
                "unlikely": sum(row["ref_logp"] < floor for row in rows) / n,
                **{f"data_{name}": value for name, value in on_data.items()},
                "best_logratio": implicit_reward_metrics(policy, best)["chosen_logratio"]}
    return more


# ---------------------------------------------------------------------------------------------------
# the online stream, saved and given again: two more sources of pairs for dpo.main

def recorded(start, args):
    """dpo.online, which also leaves each step's pairs in stream.jsonl: a line a step."""
    online, path, going_on = dpo.online(start, args), args.out / "stream.jsonl", False

    def pairs_of(step):
        nonlocal going_on
        if not going_on and path.exists():  # an interrupted run got further than its last checkpoint
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            run.write_text(path, "".join(lines[:step.number - 1]))
        going_on = True
        pairs = online(step)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(pairs) + "\n")
        return pairs
    return pairs_of


def read_stream(path) -> list[list[Encoded]]:
    """The pairs of each step, as `recorded` left them."""
    return [[Encoded(*pair) for pair in pairs] for _, pairs in run.numbered_rows(path)]


def replay(path, window: int, start, args):
    """A recorded stream in its order (window 1), or its pairs shuffled within windows of so many steps (0: all).

    Every step keeps its number of pairs, and every pair is used exactly once, as it was online.
    """
    stream, batches = read_stream(path), []
    window = window or len(stream)
    for first in range(0, len(stream), window):
        steps = stream[first:first + window]
        pairs = [pair for step in steps for pair in step]
        if window > 1:
            generator = torch.Generator().manual_seed(run.seed_of(args.seed, "replay", window, first))
            pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)]
        for step in steps:
            batches.append(pairs[:len(step)])
            pairs = pairs[len(step):]
    return lambda step: batches[step.number - 1]


# ---------------------------------------------------------------------------------------------------
# proxy and policies as classifiers

def classify(folder: Path) -> dict:
    """How often proxy and policies rank two responses as the golden reward does, whose ties are left out.

    The online and the offline policy are those at the end of training. They rank ten stretches, of five steps each,
    of the online stream; and each policy ranks samples of its own.
    """
    args = args_of(FINAL, folder)
    with run.precision(args):
        ref = load_ref(CLASSIFY, args)
        policies = {"online": policy_of(FINAL, folder, args), "offline": policy_of(OFFLINE, folder, args)}
        proxy = data.judge_named(str(folder / setting_of(CLASSIFY).name / "reward" / "model"), args.device)
        stream = read_stream(folder / FINAL.name / "stream.jsonl")
        found: dict = {"steps": [round((i + 1) * len(stream) / 10) for i in range(10)],  # where the stretches end
                       "proxy": [], "online": [], "offline": []}
        for step in found["steps"]:
            pairs = [pair for batch in stream[max(0, step - 5):step] for pair in batch]
            truth = judged_gaps(world.golden_judge, ref, pairs)
            found["proxy"].append(accuracy(judged_gaps(proxy, ref, pairs), truth))
            for arm, policy in policies.items():
                found[arm].append(accuracy(implicit_gaps(policy, pairs), truth))
        prompts = world.world_prompts()[1] * 4
        for arm, policy in policies.items():
            (ids, first, _), (_, second, _) = (
                responder(policy, args)(prompts, run.seed_of(args.seed, "self", side)) for side in range(2))
            pairs = data.add_ref_logps(ref, [Encoded(*row) for row in zip(ids, first, second)])
            truth = judged_gaps(world.golden_judge, ref, pairs)
            found[f"{arm}_self"] = accuracy(implicit_gaps(policy, pairs), truth)
    return found


def judged_gaps(judge, policy: LM, pairs: list[Encoded]) -> torch.Tensor:
    """(N,) the judge's reward of the chosen response minus that of the rejected one."""
    prompts, chosen, rejected = ([policy.decode(ids) for ids in side] for side in list(zip(*pairs))[:3])
    return torch.tensor(judge(prompts, chosen)) - torch.tensor(judge(prompts, rejected))


@torch.no_grad()
def implicit_gaps(policy: LM, pairs: list[Encoded]) -> torch.Tensor:
    """(N,) the policy's log-ratio of the chosen response minus that of the rejected one."""
    return torch.cat([torch.sub(*policy.logratios(pairs[i:i + policy.batch_size])).cpu()
                      for i in range(0, len(pairs), policy.batch_size)])


def accuracy(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of pairs whose predicted gap (N,) has the sign of the true one, 0 counting one half."""
    predicted, truth = predicted[truth != 0], truth[truth != 0]
    return ((predicted * truth > 0) + 0.5 * (predicted == 0)).mean(dtype=torch.float32).item()

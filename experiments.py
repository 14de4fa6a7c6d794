"""The controlled setting of Tang et al. 2024 (arXiv 2405.08448, section 3): training runs in it, over the cores.

The golden reward of data.py plays the human. It labels the offline pairs D_golden, two samples of pi_ref a
prompt. From the same pairs

    offline   the policy learns directly;
    online    a proxy reward model learns, which labels pairs that the policy samples as it goes.

So both arms know the same labels. Every evaluation is against the golden baseline, a policy that trained
online on the golden reward itself, and beside it against pi_ref.

Different from the paper: labels are drawn from Bradley-Terry instead of being the sign of the preference; the
proxy is a reward model instead of a pairwise one, scored once a response; and a seed changes pairs, proxy and
golden baseline, where the paper has one of each.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import re
import signal
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

import data
import dpo
import hypo
import lm
import rlhf
import run
from eval import evaluator, implicit_reward_metrics, logratios, read_metrics, win_rate
from judges import load_judge

# ---------------------------------------------------------------------------------------------------
# runs


@dataclasses.dataclass(frozen=True)
class Run:
    """One job of a seed, most often a training run; the defaults are what most runs share."""

    algorithm: str  # ipo, dpo, bo2, hypo or ppo; or setting, or classify
    source: str = "offline"  # of ipo, dpo and bo2: offline, online, iterative; replay: the pairs of the online run
    beta: float = 0.1
    lr: float = 1.0  # in units of the default learning rate
    data: str = "golden"  # which offline pairs: see make_pairs
    judge: str = "proxy"  # who labels an online run's pairs: proxy, golden; implicit: the offline policy's log-ratio
    lam: float = 0.0  # HyPO's
    rounds: int = 0  # of an iterative run
    window: int = 1  # replay: pairs are shuffled within windows of this many steps; 0: all of them
    width: int = 0  # of the policy; 0: the model that --model names
    steps: float = 1.0  # share of the study's steps
    pairs: float = 1.0  # share of the study's offline pairs

    @property
    def name(self) -> str:
        """Its directory: algorithm and source, and whatever else differs from the defaults."""
        changed = [f"{field.name}-{value:g}" if isinstance(value, (int, float)) else f"{field.name}-{value}"
                   for field in dataclasses.fields(self)[2:] if (value := getattr(self, field.name)) != field.default]
        return "-".join([self.algorithm, self.source, *changed] if self.source else [self.algorithm, *changed])

    @property
    def label(self) -> str:
        """The algorithm's name in tables and pictures."""
        return self.algorithm if self.source == "offline" else f"{self.source} {self.algorithm}"


UNCOVERED = re.compile(r"\b(?:awful|terrible|dreadful|boring|hated)\b")  # what partial-coverage data never say

GOLDEN = Run("ipo", "online", judge="golden")  # the opponent of every evaluation
EARLY = Run("ipo", "online", steps=0.2)  # the online policy as it was early on
FINAL = Run("ipo", "online")
OFFLINE = Run("ipo")
SIDES = {"early": EARLY, "final": FINAL}  # policies whose samples make offline pairs of other kinds
CLASSIFY = Run("classify", "")


def setting_of(job: Run) -> Run:
    """The job that makes the pairs and the proxy of a run."""
    return Run("setting", "", pairs=job.pairs)


def needs(seed: int, job: Run) -> list[tuple[int, Run]]:
    """The jobs that must be finished before this one."""
    if job.algorithm == "setting":
        return []
    if job == CLASSIFY:
        return [(seed, FINAL), (seed, OFFLINE)]
    found = [(seed, setting_of(job))]
    if job != GOLDEN:
        found.append((seed, GOLDEN))
    if job.judge == "implicit":
        found.append((seed, OFFLINE))
    if job.source == "replay":
        found.append((seed, dataclasses.replace(job, source="online", window=1)))
    found += [(seed, policy) for name, policy in SIDES.items() if name in job.data]
    return found


# ---------------------------------------------------------------------------------------------------
# the setting of a seed: offline pairs, held-out pairs, the proxy; and what each run is measured on


def make_setting(args) -> dict:
    """D_golden, held-out pairs, the best unseen responses, and the proxy reward model, in args.out."""
    policy, tokenizer = lm.load(args.model, data.sft_corpus, args.device)
    respond = lm.responder(policy, tokenizer, args.max_new_tokens)
    pairs, prompts, held_out, _ = data.load_pairs(None, args.pairs, respond, tokenizer, args.seed)
    data.write_jsonl(args.out / "pairs.jsonl", pairs)
    data.write_jsonl(args.out / "held_out.jsonl", held_out)

    # for some prompts, the best of 32 samples of pi_ref that are not in the pair, beside the pair's chosen response
    best = []
    asked = pairs[:128]
    texts, ids = respond([pair["prompt"] for pair in asked] * 32, run.seed_of(args.seed, "best"))
    for i, pair in enumerate(asked):
        reward, j = max((data.golden_reward(pair["prompt"], texts[j]), j) for j in range(i, len(texts), len(asked))
                        if texts[j] not in (pair["chosen"], pair["rejected"]))
        best.append({"prompt": pair["prompt"], "chosen": texts[j], "chosen_ids": ids[j], "reward": reward,
                     "rejected": pair["chosen"], "rejected_ids": pair["chosen_ids"]})
    data.write_jsonl(args.out / "best.jsonl", best)

    encoded = [lm.encode_pairs(policy, tokenizer, rows, args.max_new_tokens) for rows in (pairs, held_out)]
    rlhf.stage_1(args, policy, tokenizer, respond, encoded[0], prompts, encoded[1], held_out)
    learned = read_metrics(args.out / "reward")[-1]
    return {name: learned[name] for name in ("reward_accuracy", "golden_correlation")}


def make_pairs(job: Run, respond, folder: Path, args) -> list[dict]:
    """The offline pairs that a run learns from, of the kind job.data; the golden preference labels all kinds.

    golden: both sides from pi_ref. final-final, sft-early, early-final: sides from pi_ref (sft) and from the
    online policy after a fifth of its training (early) and at its end (final). covered: both sides from pi_ref
    given that they hold no word of UNCOVERED.
    """
    if job.data == "golden":
        return data.read_rows(folder / setting_of(job).name / "pairs.jsonl")

    def responder(side: str):
        if side == "sft":
            return respond
        policy, tokenizer = lm.load(str(folder / SIDES[side].name / "policy"), device=args.device)
        return lm.responder(policy, tokenizer, args.max_new_tokens)

    def covered(prompts, seed):
        texts, ids = respond(prompts, seed)
        while again := [i for i, text in enumerate(texts) if UNCOVERED.search(text)]:
            seed = run.seed_of(seed, "again")
            for i, text, id_ in zip(again, *respond([prompts[i] for i in again], seed)):
                texts[i], ids[i] = text, id_
        return texts, ids

    def two_sided(prompts, seed):  # collect_pairs asks for all first responses, then for all second ones
        half = len(prompts) // 2
        first, second = first_side(prompts[:half], seed), second_side(prompts[half:], run.seed_of(seed, "second"))
        return first[0] + second[0], first[1] + second[1]

    if job.data != "covered":
        first_side, second_side = map(responder, job.data.split("-"))
    prompts, _ = data.world_prompts()
    return data.collect_pairs(covered if job.data == "covered" else two_sided, prompts, args.pairs, args.seed)


def implicit_judge(policy, ref, tokenizer, max_new_tokens: int):
    """A policy's implicit reward as a judge: log pi(y|x) / pi_ref(y|x), nats."""
    @torch.no_grad()
    def judge(prompts: list[str], responses: list[str], batch_size: int = 64) -> list[float]:
        rewards = []
        for i in range(0, len(prompts), batch_size):
            rows = ([lm.encode_prompt(tokenizer, text) for text in prompts[i:i + batch_size]],
                    [lm.encode_response(tokenizer, text, max_new_tokens) for text in responses[i:i + batch_size]])
            rewards += (lm.logps(policy, *rows) - lm.logps(ref, *rows)).tolist()
        return rewards
    return judge


def measures(ref, pairs: list[dict], best: list[dict], baseline, proxy):
    """The function (policy, evaluated rows) -> metrics that the studies add to every evaluation.

    win_rate_picks, win_rate_judges        against pi_ref on each half of the held-out prompts
    golden_win_rate_picks, ..._judges      against the golden baseline
    sampled_proxy_reward                   mean reward by the proxy, where golden_reward is by the golden one
    data_accuracy, data_chosen_logratio, data_rejected_logratio     on 256 pairs of D_golden, as labelled
    best_logratio                          log-ratio of good responses that are not in D_golden
    uncovered                              share of responses that say what partial-coverage data never say

    pairs: D_golden; best: best.jsonl; both as token ids. baseline: the golden baseline's rewards, or None.
    """
    pairs, best = lm.add_ref_logps(ref, pairs[:256]), lm.add_ref_logps(ref, best)

    def more(policy, rows: list[dict]) -> dict:
        rewards, ref_rewards = [row["reward"] for row in rows], [row["ref_reward"] for row in rows]
        texts = [row["response"] for row in rows]
        opponents = {"win_rate": ref_rewards, **({"golden_win_rate": baseline} if baseline else {})}
        metrics = {f"{name}_{half}": win_rate(rewards[start::2], against[start::2])[0]
                   for name, against in opponents.items() for half, start in (("picks", 0), ("judges", 1))}
        judged = proxy([row["prompt"] for row in rows], texts)
        on_data = implicit_reward_metrics(policy, pairs)
        return {**metrics, "sampled_proxy_reward": sum(judged) / len(judged),
                **{f"data_{name}": value for name, value in on_data.items()},
                "best_logratio": implicit_reward_metrics(policy, best)["chosen_logratio"],
                "uncovered": sum(bool(UNCOVERED.search(text)) for text in texts) / len(texts)}

    return more


# ---------------------------------------------------------------------------------------------------
# the online stream, saved and given again


def recorded(pairs_of_step, path: Path):
    """The same source, which also leaves each step's pairs, as token ids, in a file: a line a step."""
    def source(step: int) -> list[dict]:
        nonlocal checked
        if not checked and path.exists():  # an interrupted run got further than its last checkpoint
            with open(path, encoding="utf-8") as lines:
                data.write_text(path, "".join(itertools.islice(lines, step - 1)))
        checked = True
        pairs = pairs_of_step(step)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(pairs) + "\n")
        return pairs
    checked = False
    return source


def replay(stream: list[list[dict]], window: int, args):
    """A source: the stream in its order (window 1), or its pairs shuffled within windows of so many steps (0: all).

    Every step keeps its number of pairs, and every pair is used exactly once, as it was online.
    """
    window, batches = window or len(stream), []
    for start in range(0, len(stream), window):
        steps = stream[start:start + window]
        pairs = [pair for step in steps for pair in step]
        if window > 1:
            generator = torch.Generator().manual_seed(run.seed_of(args.seed, "replay", window, start))
            pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)]
        for step in steps:
            batches.append(pairs[:len(step)])
            pairs = pairs[len(step):]
    return lambda step: batches[step - 1]


# ---------------------------------------------------------------------------------------------------
# one job, in a process of its own


def run_args(options, seed: int, job: Run) -> argparse.Namespace:
    """The arguments of a job, as a training command would have them."""
    parser = run.parser("")
    rlhf.add_arguments(parser)
    pairs, steps = max(1, round(job.pairs * options.pairs)), max(1, round(job.steps * options.steps))
    args = run.parse(parser, [
        "--model", options.model, "--data", "world", "--sft-steps", "0", "--seed", str(seed),
        "--pairs", str(pairs), "--steps", str(steps),
        "--batch-size", str(options.batch_size), "--eval-every", str(options.eval_every),
        "--eval-samples", str(options.eval_samples), "--beta", str(job.beta), "--device", options.device,
        "--out", str(options.work / str(seed) / job.name), "--resume"])
    args.reward_lr = args.value_lr = 2 * args.lr
    args.lr *= job.lr
    args.loss, args.length_average, args.judge, args.width = job.algorithm, False, job.judge, job.width
    args.lam, args.k = job.lam, 2
    args.round_steps = -(-args.steps // job.rounds) if job.rounds else None
    return args


def finished(options, seed: int, job: Run) -> bool:
    """Whether a job was done with these settings; ValueError if with others."""
    args = run_args(options, seed, job)
    path = args.out / "summary.json"
    if not path.exists():
        return False
    then, now = json.loads(path.read_text())["settings"], run.settings(args)
    differ = [f"{key} {then.get(key)} (now {now[key]})" for key in now if then.get(key) != now[key]]
    if differ:
        raise ValueError(f"{args.out} was made with other settings: {', '.join(differ)}; move {options.work} away, or "
                         "give the settings it was made with")
    return True


def execute(options, seed: int, job: Run) -> None:
    """Do one job; what it prints goes to log.txt beside its results."""
    torch.set_num_threads(options.threads)
    args = run_args(options, seed, job)
    settings = run.settings(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log), run.precision(args):  # no bar where stderr is a file
        folder = options.work / str(seed)
        if job.algorithm == "setting":
            result = make_setting(args)
        elif job == CLASSIFY:
            result = classify(args, folder)
        else:
            result = train(job, args, folder)
        data.write_text(args.out / "summary.json", json.dumps({**result, "settings": settings}, indent=1) + "\n")


def train(job: Run, args, folder: Path) -> dict:
    """One training run, by the train function of the algorithm's own file."""
    name = args.model
    if job.width:
        name = str(lm.tiny_directory(data.sft_corpus(), args.device, width=job.width))
    policy, tokenizer = lm.load(name, data.sft_corpus, args.device)
    ref = lm.frozen_copy(policy)
    encode = lambda rows: lm.encode_pairs(ref, tokenizer, rows, args.max_new_tokens)  # noqa: E731
    setting = folder / setting_of(job).name
    proxy = load_judge(str(setting / "reward" / "model"), args.device)
    judge = {"proxy": proxy, "golden": data.golden_judge}.get(job.judge)
    if job.judge == "implicit":
        offline_policy, _ = lm.load(str(folder / OFFLINE.name / "policy"), device=args.device)
        judge = implicit_judge(offline_policy, ref, tokenizer, args.max_new_tokens)
    prompts, held_out_prompts = data.world_prompts()
    run.prepare(args, job.label)
    golden, best, held_out = (encode(data.read_rows(setting / name))
                              for name in ("pairs.jsonl", "best.jsonl", "held_out.jsonl"))
    baseline = json.loads((folder / GOLDEN.name / "baseline.json").read_text()) if job != GOLDEN else None
    more = measures(ref, golden, best, baseline, proxy)
    evaluate = evaluator(args, ref, tokenizer, held_out_prompts, held_out, data.golden_judge, more=more)

    def offline_pairs():
        pairs = make_pairs(job, lm.responder(ref, tokenizer, args.max_new_tokens), folder, args)
        data.write_jsonl(args.out / "pairs.jsonl", pairs)
        return encode(pairs)

    if job.algorithm == "hypo":
        hypo.train(policy, ref, tokenizer, lm.add_ref_logps(ref, offline_pairs()), evaluate, args)
    elif job.algorithm == "ppo":
        rlhf.train_ppo(policy, ref, tokenizer, prompts, judge, evaluate, args)
    else:
        if job.source == "offline":
            source = dpo.offline(ref, offline_pairs(), args)
        elif job.source == "online":
            source = recorded(dpo.online(policy, ref, tokenizer, prompts, judge, args), args.out / "stream.jsonl")
        elif job.source == "iterative":
            source = dpo.iterative(policy, ref, tokenizer, prompts, judge, args)
        else:
            online = dataclasses.replace(job, source="online", window=1)
            source = replay(data.read_rows(folder / online.name / "stream.jsonl"), job.window, args)
        dpo.train(policy, source, evaluate, args)
    if job == GOLDEN:  # its responses are the opponent of all other runs: drawn apart from every evaluation
        asked = [held_out_prompts[i % len(held_out_prompts)] for i in range(args.eval_samples)]
        texts, _ = lm.responder(policy, tokenizer, args.max_new_tokens)(asked, run.seed_of(args.seed, "baseline"))
        data.write_text(args.out / "baseline.json", json.dumps(data.golden_judge(asked, texts)))
    lm.save(policy, tokenizer, args.out / "policy")
    seconds = run.seconds(args)
    (args.out / "checkpoint.pt").unlink()
    return {"algorithm": job.label, "seconds": seconds}


def classify(args, folder: Path) -> dict:
    """How often proxy and policies rank two responses as the golden reward does, whose ties are left out.

    The online and the offline policy are those at the end of training. On ten stretches, of five steps each, of
    the online stream; and each policy on samples of its own.
    """
    ref, tokenizer = lm.load(args.model, data.sft_corpus, args.device)
    ends = {"online": FINAL, "offline": OFFLINE}
    policies = {arm: lm.load(str(folder / job.name / "policy"), device=args.device)[0] for arm, job in ends.items()}
    proxy = load_judge(str(folder / setting_of(CLASSIFY).name / "reward" / "model"), args.device)

    def text(ids):
        return lm.decode(tokenizer, ids)

    def gaps(judge, pairs):
        prompts = [text(pair["prompt"]) for pair in pairs]
        chosen, rejected = (judge(prompts, [text(pair[side]) for pair in pairs]) for side in ("chosen", "rejected"))
        return torch.tensor(chosen) - torch.tensor(rejected)

    def implicit_gaps(policy, pairs):
        chosen, rejected = logratios(policy, pairs)
        return chosen - rejected

    def accuracy(predicted, truth):
        predicted, truth = predicted[truth != 0], truth[truth != 0]
        return ((predicted * truth > 0) + 0.5 * (predicted == 0)).mean(dtype=torch.float32).item()

    stream = data.read_rows(folder / FINAL.name / "stream.jsonl")
    steps = [round((i + 1) * len(stream) / 10) for i in range(10)]  # where the stretches end
    accuracies = {"steps": steps, "proxy": [], "online": [], "offline": []}
    for step in steps:
        pairs = [pair for batch in stream[max(0, step - 5):step] for pair in batch]
        truth = gaps(data.golden_judge, pairs)
        accuracies["proxy"].append(accuracy(gaps(proxy, pairs), truth))
        for arm, policy in policies.items():
            accuracies[arm].append(accuracy(implicit_gaps(policy, pairs), truth))

    prompts = data.world_prompts()[1] * 4
    for arm, policy in policies.items():
        respond = lm.responder(policy, tokenizer, args.max_new_tokens)
        sides = [respond(prompts, run.seed_of(args.seed, "self", side))[1] for side in range(2)]
        pairs = lm.add_ref_logps(ref, [{"prompt": lm.encode_prompt(tokenizer, prompt), "chosen": a, "rejected": b}
                                       for prompt, a, b in zip(prompts, *sides)])
        accuracies[f"{arm}_self"] = accuracy(implicit_gaps(policy, pairs), gaps(data.golden_judge, pairs))
    return accuracies


# ---------------------------------------------------------------------------------------------------
# all jobs, over the cores


def make_model(options, width: int) -> None:
    """The built-in model of some width, if it is not there yet; runs share it."""
    torch.set_num_threads(options.threads)
    if width:
        lm.tiny_directory(data.sft_corpus(), options.device, width=width)
    else:
        lm.resolve(options.model, data.sft_corpus, options.device)


def with_needs(jobs: list) -> list:
    """The jobs and all that they need, each once, needs first."""
    ordered = {}
    for job in jobs:
        ordered.update(dict.fromkeys([*with_needs(needs(*job)), job]))
    return list(ordered)


def leave_interrupts() -> None:
    """Ctrl-C reaches every process of a command; a worker leaves it to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def stopping():
    """On Ctrl-C, end the workers at once: the next start goes on from their checkpoints."""
    try:
        yield
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def run_jobs(options, jobs: list) -> None:
    """Do what is missing of the jobs and of what they need, options.jobs at a time."""
    jobs = with_needs(jobs)
    done = {job for job in jobs if finished(options, *job)}
    size = {(seed, job): run_args(options, seed, job).steps if job.source else 10 for seed, job in jobs}
    failed, running = {}, {}

    def steps_taken(seed, job) -> int:
        path = options.work / str(seed) / job.name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") - 1 if path.exists() else 0

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=leave_interrupts) as pool, stopping(), tqdm(
            total=sum(size.values()), initial=sum(size[job] for job in done), desc=f"{len(jobs)} runs", unit="step",
            disable=None, dynamic_ncols=True) as bar:
        if len(done) < len(jobs):
            widths = {0} | {job.width for _, job in jobs}
            list(pool.map(make_model, [options] * len(widths), widths))
        waiting = [job for job in jobs if job not in done]
        while waiting or running:
            ready = [job for job in waiting if done.issuperset(needs(*job))]
            for job in ready[:options.jobs - len(running)]:
                running[pool.submit(execute, options, *job)] = job
                waiting.remove(job)
            if not running:  # what is left needs a run that failed
                break
            ended, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                if future.exception():
                    failed[job] = future.exception()
                else:
                    done.add(job)
            bar.n = sum(size[job] for job in done) + sum(steps_taken(*job) for job in running.values())
            bar.set_postfix_str(f"{len(done)} of {len(jobs)} runs done", refresh=False)
            bar.refresh()
    if failed:
        raise ValueError("some runs failed, and what needs them was not started; the same command tries again:\n" +
                         "\n".join(f"  {options.work}/{seed}/{job.name}: {error}"
                                   for (seed, job), error in failed.items()))

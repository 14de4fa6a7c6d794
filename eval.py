"""Evaluation: win rate by a judge, reverse KL, accuracy; the tables and curves of runs.

    python eval.py runs/hypo runs/dpo              # one table; goodhart.png: win rate against KL
    python eval.py runs/hypo --against runs/dpo    # also: win rate over another run's responses
    python eval.py runs/hypo --samples 2048        # measure the saved policy on more responses
    python eval.py runs/hypo --prompts FILE        # or on prompts of one's own, one a line
    python eval.py runs/hypo --ask "The plot was"  # what it and pi_ref answer to that

A run is evaluated while it trains, on prompts it never trains on, always with the same random
numbers. Its opponent is pi_ref's distribution: many samples, drawn once for runs of all seeds.
Training reads none of these numbers.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import textwrap
from pathlib import Path
from typing import Any

import torch

import run
from judges import judged_samples, load_judge, logps_of
from lm import LM, Prompt, Refused, card_of, message, progress, text_of
from rows import prompt_ids, prompt_of, read_objects
from run import UserError

# an algorithm has the same colour in every picture
COLORS = {"hypo": "#c2410c", "dpo": "#1d4ed8", "online dpo": "#7c3aed", "iterative dpo": "#4d7c0f",
          "ppo": "#15803d", "ipo": "#0e7490", "online ipo": "#be185d", "iterative ipo": "#a16207",
          "rloo": "#0f766e", "grpo": "#9d174d", "bo2": "#6b7280", "online bo2": "#111827", "iterative bo2": "#9a3412"}
# a square-root scale, for a KL: it has a 0, for which log has no place
ROOT_SCALE: dict = dict(value="function", functions=(lambda x: abs(x) ** 0.5, lambda root: root**2))
IN_CELL = str.maketrans({"|": r"\|", "\n": " "})  # a cell of Markdown holds no bare bar and no line break
OPTIMA = [4 * 40 ** (-i / 29) for i in range(30)]  # the b of the frontier, from 4 down to 0.1


# ---- measures

def win_rate(rewards, opponent_rewards) -> tuple[float, tuple[float, float]]:
    """Share of comparisons won, a tie counting one half, and its 95 % Wilson interval."""
    n = len(rewards)
    wins = sum(0.5 * (a == b) + (a > b) for a, b in zip(rewards, opponent_rewards, strict=True))
    return wins / n, wilson_interval(wins, n)


def win_rate_over(rewards, ref_rewards, n_prompts: int) -> tuple[float, tuple[float, float]]:
    """Win rate against pi_ref's distribution: a response meets all that pi_ref says to its prompt.

    rewards: of the responses to n_prompts prompts in turn, again and again; ref_rewards likewise.
    The interval is that of one comparison a response, which is a little too wide.
    """
    meets = [ref_rewards[i % n_prompts::n_prompts] for i in range(len(rewards))]
    wins = sum(win_rate([r] * len(theirs), theirs)[0] for r, theirs in zip(rewards, meets))
    return wins / len(rewards), wilson_interval(wins, len(rewards))


def off_support(logps, ref_logps) -> float:
    """Share of responses that pi_ref all but never writes, by log pi_ref(y|x) of each, nats.

    They lie under the 0.1 % quantile of pi_ref's own samples, or of few samples under the lowest.
    Pairs of pi_ref's samples do not cover them, and no reward model of such pairs has seen any.
    """
    floor = quantile(ref_logps, 0.001)
    return sum(logp < floor for logp in logps) / len(logps)


def quantile(values, share: float) -> float:
    """This share of the values is below it, or a little less."""
    return sorted(values)[int(share * len(values))]


def frontier(rewards, opponent: float = math.inf) -> list[tuple[float, float, float]]:
    """(KL, win rate, mean reward) of the best policies there are, from the rewards of pi_ref's samples.

    The optimum of V - b KL is pi_ref(y|x) exp(r/b) / Z, so its samples are pi_ref's own with weights;
    b is each of OPTIMA. One Z serves all prompts, as if they were alike, which the world's are.
    opponent: the b of the optimum that the win rate is against; infinite is pi_ref itself.
    """
    r, points = torch.as_tensor(rewards, dtype=torch.float64), []  # (N,)
    values, which = r.unique(return_inverse=True)  # (U,) ascending, (N,)
    theirs = torch.zeros_like(values).index_add(0, which, torch.softmax(r / opponent, 0))  # (U,)
    wins = (theirs.cumsum(0) - theirs / 2)[which]  # (N,): what is below, and half of the ties
    for b in OPTIMA:
        weights = torch.softmax(r / b, 0)  # (N,); pi_ref's own are 1/N
        kl = torch.xlogy(weights, weights * len(r)).sum()
        points.append((kl.item(), (weights @ wins).item(), (weights @ r).item()))
    return points


def wilson_interval(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike wins/n +- z sd it stays inside [0, 1]."""
    # the p with |wins/n - p| <= z sqrt(p (1 - p) / n): between the roots of a quadratic
    center = (wins + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


@torch.no_grad()
def implicit_reward_metrics(policy: LM, pairs) -> dict:
    """How the implicit reward, proportional to log pi / pi_ref, sees held-out labelled pairs."""
    n = policy.batch_size
    batches = [policy.logratios(pairs[i:i + n])
               for i in progress(range(0, len(pairs), n), "held-out pairs", "batches")]
    chosen, rejected = (torch.cat(side) for side in zip(*batches))  # (N,), (N,)
    gap = chosen - rejected  # at step 0 it is rounding, which is a tie
    correct = torch.where(gap.abs() < 1e-4, 0.5, (gap > 0).float())
    return {"accuracy": correct.mean().item(), "chosen_logratio": chosen.mean().item(),
            "rejected_logratio": rejected.mean().item()}


@dataclasses.dataclass
class Evaluator:
    """evaluate(policy) -> metrics on held-out prompts and pairs; docs/glossary.md explains each."""
    start: Any  # data.Start; what pleases both of its judges is less likely to be a trick
    args: argparse.Namespace

    def __call__(self, policy: LM) -> dict:
        start, args, n, judge = self.start, self.args, self.args.eval_samples, self.start.outcome
        prompts = (list(start.held_out_prompts) * n)[:n]  # again and again, if they are few
        generator = torch.Generator(args.device).manual_seed(run.seed_of(args.seed, "evaluation"))
        prompt_ids, responses, texts = policy.respond(prompts, args.max_new_tokens, generator)
        rewards = judge(prompts, texts) if judge else [None] * n
        metrics: dict = {"win_rate": None, "win_rate_ci": None, "golden_reward": None}
        if judge:
            reward = "golden_reward" if judge.name == "golden" else "judge_reward"  # can be gamed
            metrics = self.against_ref(rewards, "reward", "win_rate") | {reward: sum(rewards) / n}
        if start.second:  # another judge of the same responses
            second = start.second(prompts, texts)  # n rewards
            metrics |= self.against_ref(second, "second_reward", "second_win_rate")
            metrics["second_reward"] = sum(second) / n
        if start.held_out:  # whole batches, as pi_ref's log-probs were taken
            whole = -(-n // policy.batch_size) * policy.batch_size
            metrics |= implicit_reward_metrics(policy, start.held_out[:whole])
        kl = policy.reverse_kl(start.ref, prompt_ids, responses)  # (n,) nats
        ref_logps = logps_of(start.ref, prompt_ids, responses)  # n
        metrics |= {"reverse_kl": kl.mean().item(), "off_support": off_support(
            ref_logps, [row["logp"] for row in self.samples]), "response_length": sum(map(len, responses)) / n}
        rows = [dict(prompt=x, response=y, reward=r, ref_logp=logp, ref_response=ref["response"],
                     ref_reward=ref["reward"])
                for x, y, r, logp, ref in zip(prompts, texts, rewards, ref_logps, self.samples)]
        run.write_rows(args.out / "responses.jsonl", [  # to read while the run goes on
            {**row, "ref_logp": round(row["ref_logp"], 2)} for row in rows])
        return metrics | (start.more(policy, rows) if start.more else {})

    @functools.cached_property
    def samples(self) -> list[dict]:
        """pi_ref's own samples, the same for every policy."""
        start, args = self.start, self.args
        return start.samples or judged_samples(
            start.ref, start.held_out_prompts, args.eval_samples, args.max_new_tokens,
            run.seed_of("pi_ref"), start.outcome, start.second)

    def against_ref(self, rewards, name: str, rate: str) -> dict:
        """The win rate of responses with these rewards against pi_ref, and its interval."""
        found = win_rate_over(rewards, [row[name] for row in self.samples], len(self.start.held_out_prompts))
        return dict(zip((rate, f"{rate}_ci"), found))


# ---- what a run leaves behind

# what summary.json and the model card take from the last evaluation
MEASURED = ("win_rate", "win_rate_ci", "golden_reward", "judge_reward", "second_win_rate",
            "second_win_rate_ci", "second_reward", "reverse_kl", "off_support", "response_length", "accuracy",
            "chosen_logratio", "rejected_logratio")


def finish(start, args) -> dict:
    """policy/, summary.json, samples.md and curve.png of a trained run; returns the summary.

    Of several processes the first does it; the others return {}.
    """
    if run.RANK:
        return {}
    lines, seconds = read_metrics(args.out), run.seconds(args)  # seconds over all resumptions
    measured = {name: lines[-1].get(name) for name in MEASURED}
    summary = {x: getattr(args, x) for x in ("algorithm", "model", "seed", "steps", "beta")}
    speed = sum(line.get("tokens", 0) for line in lines) / seconds
    summary |= measured | {"seconds": round(seconds, 1), "tokens_per_second": round(speed),
        "pi_ref": start.ref.source, "judge": start.outcome and start.outcome.name,
        "second_judge": start.second and start.second.name, "commit": run.commit(),
        "settings": run.settings(args), "frontier": frontier_of(start)}
    with run.touching(args.out / "policy", "--out"):
        start.policy.save(args.out / "policy", model_card(
            args, "AutoModelForCausalLM", "A policy for research on preference fine-tuning. It goes on "
            "where the prompt ends, and was measured on the prompts of its own task only.", measured))
    plot_curve(args.out, summary, lines)
    write_samples(args.out / "samples.md", read_responses(args.out))
    run.write_text(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")  # always last
    print(table([{"run": "pi_ref", **lines[0]}, {"run": args.algorithm, **lines[-1]}]))
    print(f"\n{seconds:.0f} s of training; see {args.out}/curve.png, {args.out}/samples.md and the "
          f"model in {args.out}/policy/")
    return summary


def frontier_of(start) -> list | None:
    """The frontier by the judge that measures, if pi_ref's samples are enough to show it."""
    rewards = [row["reward"] for row in start.samples or []]
    return frontier(rewards) if start.outcome and len(rewards) >= 1000 else None


def model_card(args, kind: str, what: str, measured: dict) -> str:
    """README.md of a saved model: its licence, how to load it, how it was trained, what it measures."""
    head = card_of(args.model)  # hubs read the head of a card, and link to the base model
    if args.model != "tiny" and not os.path.isdir(args.model):
        head["base_model"] = args.model
    licence = head.get("license", "mit" if args.model == "tiny" else None)
    results = [f"| {name} | {x:.4g} |" for name, x in measured.items() if isinstance(x, float)]
    settings = [f"| {name} | {x} |" for name, x in run.settings(args).items() if x is not None]
    return "\n".join([
        "---", "library_name: transformers", f"tags: [{args.algorithm}, rlhf]",
        *[f"{name}: {value}" for name, value in (("license", licence), ("base_model", head.get(
            "base_model"))) if value],
        "---", f"# {args.algorithm} on {Path(args.model).name}", "", what, "",
        "Licence: that of the base model" + (f", {licence}." if licence else ", which its own card names."),
        "", "```python", f"from transformers import AutoTokenizer, {kind}",
        f'model = {kind}.from_pretrained("DIR")', 'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        "```", "", "| measured on held-out prompts | |", "| --- | ---: |", *results,
        "", f"| trained by {args.algorithm} with | |", "| --- | --- |", *settings, ""])


def read_metrics(directory) -> list[dict]:
    """The lines of a run's metrics.jsonl; line i is step i."""
    path = Path(directory) / "metrics.jsonl"
    if not os.path.exists(path):
        raise UserError(f"{directory}: not a run, for it has no metrics.jsonl; name directories "
                        "that hypo.py, dpo.py or rlhf.py wrote, such as runs/hypo")
    lines = run.read_rows(path)
    if not any("reverse_kl" in row for row in lines):
        raise UserError(f"{path} holds no evaluation of a policy; name the run of one, such as "
                        "runs/hypo or runs/ppo")
    return lines


def read_responses(directory) -> list[dict]:
    """The rows of a run's responses.jsonl."""
    path = Path(directory) / "responses.jsonl"
    rows = run.read_rows(path)
    if not rows or not all({"prompt", "reward"} <= row.keys() for row in rows):
        raise UserError(f"{path} does not hold a run's responses; was it changed?")
    return rows


def read_summary(directory) -> dict:
    """summary.json of a finished run; {} while it is still going on."""
    path = Path(directory) / "summary.json"  # finish writes it last, when the run is complete
    return run.read_json(path) if path.exists() else {}


def write_samples(path, rows: list[dict], n: int = 12) -> None:
    """samples.md: the first responses, the reference's beside the policy's, with their rewards."""
    lines = ["| prompt | pi_ref | reward | policy | reward |", "| --- | --- | ---: | --- | ---: |"]
    for row in rows[:n]:
        cells = (row[x] for x in ("prompt", "ref_response", "ref_reward", "response", "reward"))
        texts = (f"{x:+.1f}" if isinstance(x, float) else text_of(x or "").strip() for x in cells)
        lines.append(f"| {' | '.join(text.translate(IN_CELL) for text in texts)} |")
    run.write_text(path, "\n".join(lines) + "\n")


COLUMNS = {  # of a table: a metric, its header, and its form
    "run": ("run", "{}"), "step": ("step", "{}"), "win_rate": (
        "win rate [95 % of sampling]", "{:.3f} [{win_rate_ci[0]:.3f}, {win_rate_ci[1]:.3f}]"),
    "golden_reward": ("reward", "{:+.2f}"), "judge_reward": ("judge's reward", "{:+.2f}"),
    "second_win_rate": ("second judge's win rate", "{:.3f}"),
    "reverse_kl": ("reverse KL, nats", "{:.2f}"), "off_support": ("off support", "{:.3f}"),
    "response_length": ("length", "{:.1f}"),
    "accuracy": ("accuracy", "{:.3f}"), "chosen_logratio": (
        "log-ratio chosen / rejected", "{:+.1f} / {rejected_logratio:+.1f}")}


def table(rows: list[dict]) -> str:
    """Measured rows as text: one line a run, "-" where nothing was measured."""
    columns = []  # two are optional: shown where some row has them
    for name, (header, form) in COLUMNS.items():
        cells = ["-" if row.get(name) is None else form.format(row[name], **row) for row in rows]
        if name not in ("judge_reward", "second_win_rate") or any(cell != "-" for cell in cells):
            columns.append([header, *cells])
    return aligned([list(row) for row in zip(*columns)])


def aligned(cells: list[list[str]]) -> str:
    """Rows of cells as lines of text, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*cells)]  # characters
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


# ---- pictures

def panels(ylabels: list[str], xlabel: str, width: float = 4.5):
    """(figure, axes): panels side by side."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * len(ylabels), 3.6), layout="constrained")  # inches
    axes = figure.subplots(1, len(ylabels), squeeze=False)[0]
    for axis, ylabel in zip(axes, ylabels):
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def line(axis, xs, ys, color: str, label: str = "", **how) -> None:
    """A line with a dot a checkpoint, and its label at its end."""
    axis.plot(xs, ys, color=color, **{"marker": "o", "markersize": 3, "lw": 1.2, **how})
    axis.annotate(label, (xs[-1], ys[-1]), color=color, fontsize=9, xytext=(6, 0), va="center",
                  textcoords="offset points", annotation_clip=False)


def save(figure, path) -> None:
    """The picture, in a folder that is made if need be."""
    with run.touching(path, "--out"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def plot_curve(out, summary: dict, lines: list[dict]) -> None:
    """curve.png of a run: win rate and KL against the step; with a learned reward, both rewards."""
    points = [row for row in lines if "reverse_kl" in row]  # the evaluations
    curves = {name: [row[name] for row in points] for name in points[0]}
    steps, color = curves["step"], COLORS.get(summary["algorithm"], "black")
    judged, two = summary["win_rate"] is not None, summary.get("second_win_rate") is not None
    learned = "proxy_reward" in lines[-1] and summary["golden_reward"] is not None
    labels = ["win rate against pi_ref" if judged else "accuracy on held-out pairs",
              "KL(policy || pi_ref), nats a sequence", *["mean reward"] * learned]
    figure, axes = panels(labels, "step")
    line(axes[0], steps, curves["win_rate" if judged else "accuracy"], color, "first judge" * two)
    if judged:  # the band is Wilson's, of the samples
        axes[0].fill_between(steps, *zip(*curves["win_rate_ci"]), color=color, alpha=0.15, lw=0)
        axes[0].axhline(0.5, color="gray", lw=0.8, ls=":")  # as good as pi_ref
    if two:  # where the two part, one of them is being gamed
        line(axes[0], steps, curves["second_win_rate"], "gray", "second judge")
    line(axes[1], steps, curves["reverse_kl"], color)
    if learned:  # the reward model's view is logged in every step
        proxy = [row["proxy_reward"] for row in lines[1:]]
        line(axes[2], steps, curves["golden_reward"], color, "golden")
        line(axes[2], range(1, len(lines)), proxy, "gray", "learned", marker="")
    note = "; band: 95 % of sampling, not of seeds" * judged
    figure.suptitle(f"{summary['algorithm']} on {Path(summary['model']).name}, beta "
                    f"{summary['beta']}, seed {summary['seed']}{note}", fontsize=10)
    save(figure, Path(out) / "curve.png")


def draw_frontier(axis, best) -> None:
    """The frontier of win rates, from pi_ref on: what lies below is wasted KL."""
    kl, rates, _ = zip(*best)
    axis.plot([0, *kl], [0.5, *rates], color="black", lw=1.0, ls="--", zorder=1)
    axis.annotate("best possible", (kl[-1], rates[-1]), xytext=(4, 0), textcoords="offset points",
                  fontsize=9, va="center", annotation_clip=False)


def plot_goodhart(runs: dict[str, list[dict]], names: dict[str, str], path, best=()) -> None:
    """Win rate against KL, a panel a judge; runs, names: directory -> metrics lines, algorithm.

    best: the frontier, if all runs have the same; up to it everything is possible.
    """
    two = any(row.get("second_win_rate") is not None for rows in runs.values() for row in rows)
    labels = ["win rate against pi_ref", "the same by the second judge"][:1 + two]
    figure, axes = panels(labels, "KL(policy || pi_ref), nats a sequence (square-root scale)", 6.0)
    for axis, metric in zip(axes, ("win_rate", "second_win_rate")):
        axis.sharey(axes[0])  # one quantity, one scale; shared before it is fitted to what is drawn
        for directory, rows in runs.items():
            points = [row for row in rows if row.get(metric) is not None]
            if not points:  # run without a judge: it has no win rate to draw
                continue
            name, alone = names[directory], list(names.values()).count(names[directory]) == 1
            color, label = COLORS.get(name, "black"), Path(directory).name if alone else name
            x, y = [row["reverse_kl"] for row in points], [row[metric] for row in points]
            shown = {text.get_text() for text in axis.texts}  # runs of one algorithm share a label
            line(axis, x, y, color, "" if label in shown else label, alpha=1 if alone else 0.5)
            if len(points) > 1:  # which way time goes
                axis.annotate("", (x[-1], y[-1]), (x[-2], y[-2]),
                              arrowprops=dict(arrowstyle="->", color=color))
        if best and axis is axes[0]:
            draw_frontier(axis, best)
        axis.axhline(0.5, color="gray", lw=0.8, ls=":")
        axis.set_xscale(**ROOT_SCALE)
        axis.set(xmargin=0.15, xlim=(0, None))  # room for labels
    figure.suptitle("a line a run, a dot a checkpoint, the arrow points to the last", fontsize=10)
    save(figure, path)


# ---- the command

def against(directory, opponent) -> tuple[float, tuple[float, float]]:
    """(win rate, its 95 % interval) of one run's responses over another's, as they were judged."""
    for path in (directory, opponent):
        read_metrics(path)  # says so if it is not a run
    mine, theirs = read_responses(directory), read_responses(opponent)
    if [row["prompt"] for row in mine] != [row["prompt"] for row in theirs]:
        raise UserError(f"{directory} and {opponent} were evaluated on different prompts; give "
                        "both the same --data, --seed and --eval-samples")
    if any(row["reward"] is None for row in mine + theirs):  # nobody judged them
        raise UserError(f"{directory} or {opponent} was run without a judge; run it with --judge")
    return win_rate([row["reward"] for row in mine], [row["reward"] for row in theirs])


def reload(directory, flag: str) -> argparse.Namespace:
    """What a finished run leaves for more: policy, pi_ref, judges, its prompts, its arguments."""
    summary, directory = read_summary(directory), Path(directory)
    if not summary:
        raise UserError(f"{flag}: {directory} is not finished, so it has no policy yet")
    settings: Any = summary.get("settings")
    has = {*summary, *(settings if isinstance(settings, dict) else ())}
    lacks = {"judge", "second_judge", "pi_ref", "device", "dtype", "seed", "steps", "batch_size",
             "max_new_tokens", "micro_batch"} - has
    if lacks:
        raise UserError(f"{flag}: {directory}/summary.json has no {min(lacks)}; was the run made "
                        "by another version?")
    args = argparse.Namespace(**{**settings, "out": directory / "again", "resume": False})
    if args.device != "cpu" and not torch.cuda.is_available():  # it was run on another machine
        args.device, args.dtype = "cpu", "float32"
    names = [summary[role] or "none" for role in ("judge", "second_judge")]
    try:  # a reward model that rlhf.py trained lies in the run's own directory
        paths = [str(directory / name) if (directory / name).is_dir() else name for name in names]
        outcome, second = (load_judge(path, args.device) for path in paths)
        ref, policy = (LM.load(path, args.device, args.micro_batch, args.batch_size)
                       for path in (summary["pi_ref"], str(directory / "policy")))
    except Refused as error:
        raise UserError(f"{flag}: {directory} cannot be loaded again: {error}") from error
    prompts = {text_of(row["prompt"]): row["prompt"] for row in read_responses(directory)}
    return argparse.Namespace(  # each prompt once, in their order
        args=args, policy=policy, ref=ref, held_out_prompts=[*prompts.values()], held_out=[],
        outcome=outcome, second=second, samples=None, more=None)


def measured_again(directory, samples: int | None, file: str | None) -> dict:
    """A finished run's last line with other responses, which directory/again/ then holds."""
    start = reload(directory, "--prompts" if file else "--samples")
    args = start.args
    if file:
        start.held_out_prompts = [readable(row, where, start, args.max_new_tokens)
                                  for where, row in read_prompts(file)]
    args.eval_samples = samples or len(start.held_out_prompts)
    with run.working(args):
        measured = {"step": args.steps, **Evaluator(start, args)(start.policy)}
    run.write_rows(args.out / "metrics.jsonl", [measured])
    return measured


def read_prompts(path: str) -> list[tuple[str, dict]]:
    """("file:line", {"prompt"}) of a JSONL file, or of the lines of any other."""
    if path.endswith((".json", ".jsonl", ".gz")):
        return read_objects(path, "--prompts")
    with run.touching(path, "--prompts"):
        lines = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    prompts = [(f"{path}:{n}", {"prompt": line}) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompts")
    return prompts


def readable(row: dict, where: str, start, max_new_tokens: int) -> Prompt:
    """The row's prompt; a text is a user's turn if the run's own prompts are conversations."""
    prompt = prompt_of(row, where)
    if isinstance(prompt, str) and isinstance(start.held_out_prompts[0], list):
        prompt = [message("user", prompt)]
    prompt_ids(start.ref, prompt, where, max_new_tokens)
    return prompt


def answers(runs: dict, text: str, args, number: int) -> str:
    """What pi_ref and each run, directory -> reload, answer to a text; log-ratios, and rewards.

    number: of the question. All draw with the same random numbers: equal policies answer alike.
    """
    start = next(iter(runs.values()))
    ref, new_tokens = start.ref, args.max_new_tokens or start.args.max_new_tokens
    prompt, responses = readable({"prompt": text}, "--ask", start, new_tokens), []
    policies = {"pi_ref": ref, **{path: start.policy for path, start in runs.items()}}
    n, ids = len(policies), ref.encode_prompt(prompt)
    seed = run.seed_of(args.seed or 0, "ask", number)
    with torch.no_grad(), run.precision(start.args):
        for policy in policies.values():
            generator = torch.Generator(ref.device).manual_seed(seed)
            responses += policy.sample([ids], new_tokens, generator, args.temperature or 1.0)
        logps = [policy.logps([ids] * n, responses) for policy in policies.values()]  # of (n,)
    texts = [ref.decode(response) for response in responses]
    figures = {f"log-ratio of {path}, nats": logp - logps[0] for path, logp in zip(runs, logps[1:])}
    figures |= {name: judge([prompt] * n, texts) for name, judge in (
        ("reward", start.outcome), ("second judge's", start.second)) if judge}
    columns = [[name, *map("{:+.2f}".format, numbers)] for name, numbers in figures.items()]
    lines = []
    for name, response, text in zip(policies, responses, texts):
        lines += [name + (":" if ref.ended(response) else ", cut:"),
                  *(textwrap.fill(line, 80) for line in text.strip().split("\n")), ""]
    return "\n".join([*lines, aligned([list(row) for row in zip(["", *policies], *columns)]), ""])


def ask(args) -> None:
    """Print the answers to the text of --ask; without one, to each line until an empty one."""
    runs = {path: reload(path, "--ask") for path in args.runs}
    sources = [start.ref.source for start in runs.values()]
    if len({*sources}) > 1:
        raise UserError(f"--ask: the runs have no common pi_ref, but {' and '.join(sources)}")
    typed = iter(functools.partial(input, "prompt (an empty line ends)> "), "")
    try:
        for number, text in enumerate([args.ask] if args.ask else typed):
            try:
                print(answers(runs, text, args, number))
            except UserError as error:
                if args.ask:
                    raise
                print(f"{error}\n")
    except EOFError:  # Ctrl-D
        print()


def arguments(argv) -> argparse.Namespace:
    """The command's arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories that hypo.py, dpo.py or rlhf.py wrote")
    add("--against", metavar="RUN", help="also the win rate against this run's responses")
    add("--samples", type=run.COUNT, help="measure the saved policies again, on so many responses")
    add("--prompts", metavar="FILE", help="measure them on these prompts: a text file, one a line, or "
        ".jsonl with a field prompt, a text or messages")
    add("--out", default="goodhart.png", help="the picture (default goodhart.png)")
    add("--ask", nargs="?", const="", metavar="TEXT", help="what pi_ref and the policies answer, with "
        "log pi/pi_ref in nats and the first run's judges' rewards; without TEXT, a prompt loop")
    add("--temperature", type=run.number(float, 0.01), help="of the answers (default 1, the "
        "policy itself, whose log pi/pi_ref is shown in any case; near 0, greedy)")
    add("--seed", type=run.SEED, help="another one draws other answers (default 0)")
    add("--max-new-tokens", type=run.COUNT, help="longest answer (default: that of the first run)")
    args = parser.parse_args(argv)
    how, names = ("without", ("temperature", "seed", "max_new_tokens")) if args.ask is None else (
        "with", ("against", "samples", "prompts"))
    for name in names:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} would have no effect {how} --ask")
    form, forms = Path(args.out).suffix[1:], panels([""], "")[0].canvas.get_supported_filetypes()
    if form not in forms:
        parser.error(f"--out {args.out}: the picture's name must end in .png, .pdf or .svg")
    if args.against and {args.against} == {*args.runs}:
        parser.error(f"--against {args.against} is the only run that is given")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.ask is not None:
        return ask(args)
    runs = {directory: read_metrics(directory) for directory in args.runs}
    again = "again" if args.samples or args.prompts else ""  # where measured_again writes
    for path in {*runs, args.against} - {None} if again else ():
        line = measured_again(path, args.samples, args.prompts)
        if path in runs:
            runs[path] = [line] if args.prompts else [*runs[path][:-1], {**runs[path][-1], **line}]
    names = {path: read_summary(path).get("algorithm", Path(path).name) for path in runs}
    last = ([row for row in lines if "reverse_kl" in row][-1] for lines in runs.values())
    rows = [{**row, "run": path} for path, row in zip(runs, last)]  # a run may be still going on
    pi_ref = {"run": "pi_ref", **runs[args.runs[0]][0]}  # measured on the run's own prompts
    print(table(rows if args.prompts else [pi_ref, *rows]))
    for directory in [path for path in runs if args.against not in (None, path)]:
        rate, (low, high) = against(Path(directory) / again, Path(args.against) / again)
        print(f"{directory} against {args.against}: win rate {rate:.3f} [{low:.3f}, {high:.3f}]")
    best = {json.dumps(read_summary(path).get("frontier")) for path in runs}
    plot_goodhart(runs, names, args.out, json.loads(best.pop()) if len(best) == 1 else ())
    print(f"\nwin rate against KL, a dot a checkpoint: {args.out}")


if __name__ == "__main__":
    run.start(main, again="the same command begins anew")

"""Evaluation: win rate by a judge, reverse KL, accuracy; the tables and curves of runs.

    python eval.py runs/hypo runs/dpo                  # one table, and goodhart.png: win rate against KL
    python eval.py runs/hypo --against runs/dpo        # win rate of one policy's responses over another's
    python eval.py runs/hypo --samples 2048            # measure the saved policy again, on more responses

A run is evaluated while it trains, on prompts it never trains on, always with the same prompts, the same
random seed and the same opponent: pi_ref's responses. Training reads none of these numbers.
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import run
from judges import load_judge
from lm import LM, Refused
from run import UserError

# an algorithm has the same colour in every picture
COLORS = {"hypo": "#c2410c", "dpo": "#1d4ed8", "ipo": "#0e7490", "bo2": "#6b7280", "ppo": "#15803d",
          "rloo": "#0f766e", "online dpo": "#7c3aed", "online ipo": "#be185d", "online bo2": "#111827",
          "iterative dpo": "#4d7c0f", "iterative ipo": "#a16207", "iterative bo2": "#9a3412"}


# ---- measures

def win_rate(rewards, opponent_rewards) -> tuple[float, tuple[float, float]]:
    """Share of comparisons won, a tie counting one half, and its 95 % Wilson interval."""
    n = len(rewards)
    wins = sum(0.5 * (a == b) + (a > b) for a, b in zip(rewards, opponent_rewards, strict=True))
    return wins / n, wilson_interval(wins, n)


def wilson_interval(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike wins/n +- z sd it stays inside [0, 1]."""
    center = (wins + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


@torch.no_grad()
def implicit_reward_metrics(policy: LM, pairs, batch_size: int = 64) -> dict:
    """How the implicit reward, proportional to log pi / pi_ref, sees held-out labelled pairs.

    Equal log-ratios count one half in the accuracy, so it is 1/2 at step 0.
    """
    batches = [policy.logratios(pairs[i:i + batch_size]) for i in range(0, len(pairs), batch_size)]
    chosen, rejected = (torch.cat(side) for side in zip(*batches))  # (N,), (N,)
    correct = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {"accuracy": correct.mean().item(), "chosen_logratio": chosen.mean().item(),
            "rejected_logratio": rejected.mean().item()}


@dataclasses.dataclass
class Evaluator:
    """evaluate(policy) -> metrics, on held-out prompts and pairs; docs/glossary.md explains each.

    Each call leaves the responses in args.out/responses.jsonl, to read while the run goes on.
    """
    start: Any  # data.Start; what pleases both of its judges is less likely to be a trick
    args: argparse.Namespace

    @functools.cached_property
    def opponent(self) -> tuple[list[str], list[str], list]:
        """(held-out prompts, pi_ref's responses, their rewards): the same for every policy."""
        start, n = self.start, self.args.eval_samples
        prompts = [start.held_out_prompts[i % len(start.held_out_prompts)] for i in range(n)]
        generator = torch.Generator(self.args.device).manual_seed(1)
        _, _, texts = start.ref.respond(prompts, self.args.max_new_tokens, generator)
        return prompts, texts, start.outcome(prompts, texts) if start.outcome else [None] * n

    def __call__(self, policy: LM) -> dict:
        start, args, n = self.start, self.args, self.args.eval_samples
        prompts, ref_texts, ref_rewards = self.opponent
        generator = torch.Generator(args.device).manual_seed(0)  # the same numbers in every step
        prompt_ids, responses, texts = policy.respond(prompts, args.max_new_tokens, generator)
        rewards: list = [None] * n
        metrics: dict = {"win_rate": None, "win_rate_ci": None, "golden_reward": None}
        if start.outcome:
            rewards = start.outcome(prompts, texts)
            rate, interval = win_rate(rewards, ref_rewards)
            reward = "golden_reward" if start.outcome.name == "golden" else "judge_reward"
            metrics = {"win_rate": rate, "win_rate_ci": interval, reward: sum(rewards) / n}
        if start.second:  # a judge that labels nothing
            seconds = start.second(prompts, texts)
            rate, interval = win_rate(seconds, start.second(prompts, ref_texts))
            metrics |= {"second_win_rate": rate, "second_win_rate_ci": interval,
                        "second_reward": sum(seconds) / n}
        if start.held_out:  # whole batches, as pi_ref's log-probs were taken
            metrics |= implicit_reward_metrics(policy, start.held_out[:-(-n // 64) * 64])
        kl = policy.reverse_kl(start.ref, prompt_ids, responses)  # (n,) nats
        metrics |= {"reverse_kl": kl.mean().item(), "response_length": sum(map(len, responses)) / n}
        names = ("prompt", "response", "ref_response", "reward", "ref_reward")
        rows = [dict(zip(names, row)) for row in zip(prompts, texts, ref_texts, rewards, ref_rewards)]
        run.write_rows(args.out / "responses.jsonl", rows)
        return metrics | (start.more(policy, rows) if start.more else {})


# ---- what a run leaves behind

MEASURED = ("win_rate", "win_rate_ci", "golden_reward", "judge_reward", "second_win_rate",
            "second_win_rate_ci", "second_reward", "reverse_kl", "response_length", "accuracy",
            "chosen_logratio", "rejected_logratio")


def finish(start, args) -> dict:
    """policy/, summary.json, samples.md and curve.png of a trained run; returns the summary."""
    lines, seconds = read_metrics(args.out), run.seconds(args)
    measured = {name: lines[-1].get(name) for name in MEASURED}
    summary = {
        **{name: getattr(args, name) for name in ("algorithm", "model", "seed", "steps", "beta")},
        **measured, "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(line.get("tokens", 0) for line in lines) / seconds),
        "pi_ref": start.ref.source, "judge": start.outcome and start.outcome.name,
        "second_judge": start.second and start.second.name, "settings": run.settings(args)}
    start.policy.save(args.out / "policy", model_card(
        args, "A policy for research on preference fine-tuning. It goes on where the prompt ends, and "
        "was measured on the prompts of its own task only.", measured))
    plot_curve(args.out, summary, lines)
    write_samples(args.out / "samples.md", run.read_rows(args.out / "responses.jsonl"))
    run.write_text(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(table([{"run": "pi_ref", **lines[0]}, {"run": args.algorithm, **lines[-1]}]))
    print(f"\n{seconds:.0f} s of training; see {args.out}/curve.png, {args.out}/samples.md and the "
          f"model in {args.out}/policy/")
    return summary


def model_card(args, what: str, measured: dict) -> str:
    """README.md of a saved model: what it is, how it was made, what was measured."""
    base = "" if args.model == "tiny" or Path(args.model).is_dir() else f"base_model: {args.model}\n"
    results = [f"| {name} | {x:.4g} |" for name, x in measured.items() if isinstance(x, float)]
    settings = [f"| {name} | {x} |" for name, x in run.settings(args).items() if x is not None]
    return "\n".join([  # the head, between dashes, is for model hubs
        f"---\nlibrary_name: transformers\n{base}tags: [{args.algorithm}, rlhf]\n---",
        f"# {args.algorithm} on {Path(args.model).name}", "", what, "",
        "| measured on held-out prompts | |", "| --- | ---: |", *results, "",
        "| setting | |", "| --- | --- |", *settings]) + "\n"


def read_metrics(directory) -> list[dict]:
    """The lines of a run's metrics.jsonl; line i is step i."""
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{directory}: not a run, for it has no metrics.jsonl; name directories that "
                        "hypo.py, dpo.py or rlhf.py wrote, such as runs/hypo")
    return run.read_rows(path)


def read_summary(directory) -> dict:
    """summary.json of a finished run; {} while it is still going on."""
    path = Path(directory) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_samples(path, rows: list[dict], n: int = 12) -> None:
    """samples.md: the first responses, the reference's beside the policy's, with their rewards."""
    lines = ["| prompt | pi_ref | reward | policy | reward |", "| --- | --- | ---: | --- | ---: |"]
    for row in rows[:n]:
        cells = [row[name] for name in ("prompt", "ref_response", "ref_reward", "response", "reward")]
        texts = [f"{x:+.1f}" if isinstance(x, float) else (x or "").strip() for x in cells]
        lines.append(f"| {' | '.join(t.replace('|', chr(92) + '|') for t in texts)} |".replace("\n", " "))
    run.write_text(path, "\n".join(lines) + "\n")


# a column of a table: the metrics that it shows, and their form
COLUMNS: dict[str, tuple[list[str], str]] = {
    "run": (["run"], "{}"), "step": (["step"], "{}"),
    "win rate [95 % of sampling]": (
        ["win_rate", "win_rate_ci"], "{0:.3f} [{1[0]:.3f}, {1[1]:.3f}]"),
    "reward": (["golden_reward"], "{:+.2f}"), "judge's reward": (["judge_reward"], "{:+.2f}"),
    "second judge's win rate": (["second_win_rate"], "{:.3f}"),
    "reverse KL, nats": (["reverse_kl"], "{:.2f}"), "length": (["response_length"], "{:.1f}"),
    "accuracy": (["accuracy"], "{:.3f}"), "log-ratio chosen / rejected": (
        ["chosen_logratio", "rejected_logratio"], "{:+.1f} / {:+.1f}")}


def table(rows: list[dict]) -> str:
    """Measured rows as text: one line a run, "-" where nothing was measured."""
    optional = {"judge's reward", "second judge's win rate"}
    shown = {header: column for header, column in COLUMNS.items() if header not in optional or any(
        row.get(column[0][0]) is not None for row in rows)}
    cells = [list(shown)]
    for row in rows:
        values = [([row.get(name) for name in names], form) for names, form in shown.values()]
        cells.append(["-" if None in each else form.format(*each) for each, form in values])
    return aligned(cells)


def aligned(cells: list[list[str]]) -> str:
    """Rows of cells as lines of text, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(text.ljust(n) for text, n in zip(row, widths)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


# ---- pictures

def panels(ylabels: list[str], xlabel: str, width: float = 4.5):
    """(figure, axes): panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(ylabels), 3.6), layout="constrained")
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


def plot_curve(out, summary: dict, lines: list[dict]) -> None:
    """curve.png of one run: win rate and KL against the step; with a learned reward, both rewards."""
    points = [row for row in lines if "reverse_kl" in row]
    steps, color = [row["step"] for row in points], COLORS.get(summary["algorithm"], "black")
    judged, two = summary["win_rate"] is not None, summary.get("second_win_rate") is not None
    learned = "proxy_reward" in lines[-1] and summary["golden_reward"] is not None
    figure, axes = panels(["win rate against pi_ref" if judged else "accuracy on held-out pairs",
                           "KL(policy || pi_ref), nats a sequence", *["mean reward"] * learned], "step")
    first = [row["win_rate" if judged else "accuracy"] for row in points]
    line(axes[0], steps, first, color, "first judge" * two)
    if judged:
        low, high = zip(*(row["win_rate_ci"] for row in points))
        axes[0].fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
        axes[0].axhline(0.5, color="gray", lw=0.8, ls=":")
    if two:
        line(axes[0], steps, [row["second_win_rate"] for row in points], "gray", "second judge")
    line(axes[1], steps, [row["reverse_kl"] for row in points], color)
    if learned:  # the reward model's view is logged in every step
        proxy = [row["proxy_reward"] for row in lines[1:]]
        line(axes[2], steps, [row["golden_reward"] for row in points], color, "golden")
        line(axes[2], range(1, len(lines)), proxy, "gray", "learned", marker="")
    note = "; band: 95 % of sampling, not of seeds" * judged
    figure.suptitle(f"{summary['algorithm']} on {Path(summary['model']).name}, beta "
                    f"{summary['beta']}, seed {summary['seed']}{note}", fontsize=10)
    figure.savefig(Path(out) / "curve.png", dpi=130)


def plot_goodhart(runs: dict[str, list[dict]], names: dict[str, str], path) -> None:
    """Win rate against KL: a line a run, a dot a checkpoint, an arrow to the last; a panel a judge.

    runs: directory -> its metrics lines. names: directory -> its algorithm, which decides the colour.
    """
    two = any(row.get("second_win_rate") is not None for rows in runs.values() for row in rows)
    labels = ["win rate against pi_ref", "the same by the second judge"][:1 + two]
    figure, axes = panels(labels, "KL(policy || pi_ref), nats a sequence (square-root scale)", 6.0)
    for axis, metric in zip(axes, ("win_rate", "second_win_rate")):
        labelled: set[str] = set()  # runs of one algorithm share a label
        for directory, rows in runs.items():
            points = [row for row in rows if row.get(metric) is not None]
            if not points:  # run without a judge: it has no win rate to draw
                continue
            name, alone = names[directory], list(names.values()).count(names[directory]) == 1
            color, label = COLORS.get(name, "black"), Path(directory).name if alone else name
            x, y = [row["reverse_kl"] for row in points], [row[metric] for row in points]
            line(axis, x, y, color, "" if label in labelled else label, alpha=1 if alone else 0.5)
            labelled.add(label)
            if len(points) > 1:
                axis.annotate("", (x[-1], y[-1]), (x[-2], y[-2]),
                              arrowprops=dict(arrowstyle="->", color=color))
        axis.axhline(0.5, color="gray", lw=0.8, ls=":")
        axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
        axis.sharey(axes[0])
    figure.suptitle("a line a run, a dot a checkpoint, the arrow points to the last", fontsize=10)
    figure.savefig(path, dpi=130)


# ---- the command

def against(directory, opponent) -> tuple[float, float, float]:
    """(win rate, its 95 % interval) of one run's responses over another's, as they were judged."""
    for path in (directory, opponent):
        read_metrics(path)  # says so if it is not a run
    mine, theirs = (run.read_rows(Path(path) / "responses.jsonl") for path in (directory, opponent))
    if [row["prompt"] for row in mine] != [row["prompt"] for row in theirs]:
        raise UserError(f"{directory} and {opponent} were evaluated on different prompts; give both "
                        "the same --data, --seed and --eval-samples")
    if any(row["reward"] is None for row in mine + theirs):
        raise UserError(f"{directory} or {opponent} was run without a judge; run it with --judge")
    rate, (low, high) = win_rate([row["reward"] for row in mine], [row["reward"] for row in theirs])
    return rate, low, high


def measured_again(directory, samples: int) -> dict:
    """A finished run's last line with more responses, which directory/again/ then holds."""
    summary, directory = read_summary(directory), Path(directory)
    if not summary:
        raise UserError(f"--samples: {directory} is not finished, so there is no policy to measure")
    args = argparse.Namespace(
        **{**summary["settings"], "eval_samples": samples, "out": directory / "again"})
    prompts = dict.fromkeys(row["prompt"] for row in run.read_rows(directory / "responses.jsonl"))
    names = [summary[role] or "none" for role in ("judge", "second_judge")]
    try:  # a reward model that rlhf.py trained lies in the run's own directory
        outcome, second = (load_judge(str(directory / name) if (directory / name).is_dir() else name,
                                      args.device) for name in names)
        ref = LM.load(summary["pi_ref"], args.device)
        policy = LM.load(str(directory / "policy"), args.device)
    except Refused as error:
        raise UserError(f"--samples: {directory} cannot be measured again: {error}") from error
    start = SimpleNamespace(ref=ref, held_out_prompts=list(prompts), held_out=[], outcome=outcome,
                            second=second, more=None)
    with run.precision(args):
        measured = Evaluator(start, args)(policy)
    run.write_rows(args.out / "metrics.jsonl", [{"step": args.steps, **measured}])
    return measured


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories that hypo.py, dpo.py or rlhf.py wrote")
    add("--against", metavar="RUN", help="also the win rate against this run's responses")
    add("--samples", type=int, help="measure the saved policies again, on so many responses each")
    add("--out", default="goodhart.png", help="the picture (default goodhart.png)")
    args = parser.parse_args(argv)
    runs = {directory: read_metrics(directory) for directory in args.runs}
    if args.samples:
        again = {name: measured_again(name, args.samples) for name in {*runs, args.against} if name}
        for directory, lines in runs.items():
            lines[-1] = {**lines[-1], **again[directory]}
    names = {path: read_summary(path).get("algorithm", Path(path).name) for path in runs}
    rows = [{"run": "pi_ref", **next(iter(runs.values()))[0]}]
    for directory, lines in runs.items():  # the last evaluation: a run may be still going on
        rows.append({**[row for row in lines if "reverse_kl" in row][-1], "run": directory})
    print(table(rows))
    for directory in runs:
        if args.against not in (None, directory):
            pair = [Path(p) / "again" if args.samples else p for p in (directory, args.against)]
            rate, low, high = against(*pair)
            print(f"{directory} against {args.against}: win rate {rate:.3f} [{low:.3f}, {high:.3f}]")
    plot_goodhart(runs, names, args.out)
    print(f"\nwin rate against KL, a dot a checkpoint: {args.out}")


if __name__ == "__main__":
    run.start(main)

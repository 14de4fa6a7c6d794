"""Evaluation: win rate by a judge, reverse KL, accuracy; the tables and curves of runs.

    python eval.py runs/hypo runs/dpo                  # one table, and goodhart.png: win rate against KL
    python eval.py runs/hypo --against runs/dpo        # win rate of one policy's responses over another's
    python eval.py runs/hypo --samples 2048            # measure the saved policy again, on more responses

A run is evaluated while it trains, on prompts it never trains on, always with the same prompts, the same
random seed and the same opponent: pi_ref's responses. Training reads none of these numbers.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

import data
import lm
from judges import load_judge
from run import precision
from task import set_up

# an algorithm has the same colour in every picture
COLORS = {"hypo": "#c2410c", "dpo": "#1d4ed8", "ipo": "#0e7490", "bo2": "#6b7280", "online dpo": "#7c3aed",
          "online ipo": "#be185d", "online bo2": "#111827", "iterative dpo": "#4d7c0f", "iterative ipo": "#a16207",
          "iterative bo2": "#9a3412", "ppo": "#15803d", "rloo": "#0f766e"}

# Student's t at 97.5 %, by degrees of freedom
STUDENT_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 11: 2.20,
              12: 2.18, 13: 2.16, 14: 2.14, 15: 2.13, 16: 2.12, 17: 2.11, 18: 2.10, 19: 2.09}


# ---------------------------------------------------------------------------------------------------
# measures

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


def estimate(values: list[float]) -> tuple[float, float, float]:
    """(mean, half of Student's 95 % interval, standard error) over seeds; one seed has no interval."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan, math.nan
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, STUDENT_95.get(n - 1, 1.96) * error, error


def logratios(policy, pairs: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """((N,), (N,)) log pi / pi_ref of the chosen and the rejected responses; pairs as from lm.add_ref_logps."""
    chosen, rejected = lm.score_pairs(policy, pairs)
    ref_chosen, ref_rejected = lm.ref_logps(pairs, chosen.device)
    return chosen - ref_chosen, rejected - ref_rejected


def implicit_reward_metrics(policy, pairs: list[dict]) -> dict:
    """How the implicit reward, proportional to log pi / pi_ref, sees labelled pairs it was not trained on.

    pairs: as from lm.add_ref_logps. Equal log-ratios count one half in the accuracy, so it is 1/2 at step 0.
    """
    chosen, rejected = logratios(policy, pairs)
    correct = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {"accuracy": correct.mean().item(), "chosen_logratio": chosen.mean().item(),
            "rejected_logratio": rejected.mean().item()}


def evaluator(args, ref, tokenizer, prompts: list[str], pairs: list[dict], judge, second=None,
              more=lambda policy, rows: {}):
    """The function evaluate(policy) -> metrics that a training run calls; see README for the glossary.

    prompts: held-out prompt texts, cycled through to args.eval_samples. pairs: held-out, of token ids, the
    first args.eval_samples are used. judge: from load_judge; without one (None) win rate and reward are None.
    second: another judge of the same responses: what is true for both is less likely to be a trick that pleases
    one. more: function (policy, the rows of responses.jsonl) -> further metrics.
    Each call also leaves args.out/responses.jsonl and samples.md, to read while the run goes on.
    """
    pairs = lm.add_ref_logps(ref, pairs[:args.eval_samples])
    prompts = [prompts[i % len(prompts)] for i in range(args.eval_samples)]
    prompt_ids = [lm.encode_prompt(tokenizer, prompt) for prompt in prompts]

    def respond(policy, seed: int) -> list[list[int]]:
        generator = torch.Generator(policy.device).manual_seed(seed)
        return lm.sample(policy, prompt_ids, args.max_new_tokens, tokenizer.eos_token_id, generator)

    def rewards_of(texts):
        return judge(prompts, texts) if judge else [None] * len(texts)

    opponent = [lm.decode(tokenizer, response) for response in respond(ref, seed=1)]
    opponent_rewards = rewards_of(opponent)

    def evaluate(policy) -> dict:
        ids = respond(policy, seed=0)
        texts = [lm.decode(tokenizer, response) for response in ids]
        rewards = rewards_of(texts)
        rate, interval = win_rate(rewards, opponent_rewards) if judge else (None, None)
        reward_name = "golden_reward" if judge in (data.golden_judge, None) else "judge_reward"
        rows = [dict(prompt=p, response=y, ref_response=z, reward=r, ref_reward=s) for p, y, z, r, s in
                zip(prompts, texts, opponent, rewards, opponent_rewards)]
        by_second = {}
        if second:
            values = second(prompts, texts)
            second_rate, second_interval = win_rate(values, second(prompts, opponent))
            by_second = {"second_win_rate": second_rate, "second_win_rate_ci": second_interval,
                         "second_reward": sum(values) / len(values)}
        data.write_jsonl(args.out / "responses.jsonl", rows)
        write_samples(args.out / "samples.md", rows)
        return {
            "win_rate": rate, "win_rate_ci": interval,
            reward_name: sum(rewards) / len(rewards) if judge else None,
            **by_second,
            "reverse_kl": lm.reverse_kl(policy, ref, prompt_ids, ids).mean().item(),
            "response_length": sum(map(len, ids)) / len(ids),
            **implicit_reward_metrics(policy, pairs),
            **more(policy, rows),
        }

    return evaluate


# ---------------------------------------------------------------------------------------------------
# what a run leaves behind

def finish(args, policy, tokenizer, seconds: float) -> dict:
    """policy/, summary.json and curve.png of a run whose training is done; prints its table, returns the summary."""
    lines = read_metrics(args.out)
    measured = {name: lines[-1].get(name) for name in (
        "win_rate", "win_rate_ci", "golden_reward", "judge_reward", "second_win_rate", "second_win_rate_ci",
        "second_reward", "reverse_kl", "response_length", "accuracy", "chosen_logratio", "rejected_logratio")}
    summary = {
        "algorithm": args.algorithm, "model": args.model, "seed": args.seed, "steps": args.steps, "beta": args.beta,
        **measured, "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(line.get("tokens", 0) for line in lines) / seconds),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
    }
    lm.save(policy, tokenizer, args.out / "policy", model_card(
        args, "A policy for research on preference fine-tuning. It goes on where the prompt ends, and was measured on "
        "the prompts of its own task only.", measured))
    plot_curve(args.out, summary, lines)
    data.write_text(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(table([{"run": "pi_ref", **lines[0]}, {"run": args.algorithm, **lines[-1]}]))
    print(f"\n{seconds:.0f} s of training; see {args.out}/curve.png, {args.out}/samples.md and the model in "
          f"{args.out}/policy/")
    return summary


def model_card(args, what: str, measured: dict) -> str:
    """README.md of a saved model: what it is, how it was made, what was measured; its head is for model hubs."""
    base = "" if args.model == "tiny" or Path(args.model).is_dir() else f"base_model: {args.model}\n"
    results = [f"| {name} | {value:.4g} |" for name, value in measured.items() if isinstance(value, float)]
    settings = [f"| {name} | {value} |" for name, value in sorted(vars(args).items())
                if value is not None and name not in ("out", "resume", "pi_ref")]
    return "\n".join([
        f"---\nlibrary_name: transformers\n{base}tags: [{args.algorithm}, rlhf]\n---",
        f"# {args.algorithm} on {Path(args.model).name}", "", what, "",
        "| measured on held-out prompts | |", "| --- | ---: |", *results, "",
        "| setting | |", "| --- | --- |", *settings]) + "\n"


def read_metrics(run) -> list[dict]:
    """The lines of a run's metrics.jsonl; line i is step i."""
    try:
        return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{run}: not a run, for it has no metrics.jsonl; name directories that hypo.py, dpo.py or "
                         "rlhf.py wrote, such as runs/hypo") from None


def read_settings(run) -> dict:
    """The settings of a finished run; {} while it is still going on."""
    path = Path(run) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["settings"] if path.exists() else {}


def write_samples(path, rows: list[dict], n: int = 12) -> None:
    """samples.md: the first responses, the reference's beside the policy's, with their rewards."""
    cell = lambda text: text.strip().replace("|", "\\|").replace("\n", " ")  # noqa: E731
    reward = lambda value: "" if value is None else f"{value:+.1f}"  # noqa: E731
    lines = ["| prompt | pi_ref | reward | policy | reward |", "| --- | --- | ---: | --- | ---: |"]
    lines += [f"| {cell(row['prompt'])} | {cell(row['ref_response'])} | {reward(row['ref_reward'])} "
              f"| {cell(row['response'])} | {reward(row['reward'])} |" for row in rows[:n]]
    data.write_text(path, "\n".join(lines) + "\n")


def table(rows: list[dict]) -> str:
    """Measured rows as text: one line a run."""
    columns = {
        "run": lambda row: row["run"], "step": lambda row: f"{row['step']}",
        "win rate [95 %]": lambda row: "{:.3f} [{:.3f}, {:.3f}]".format(row["win_rate"], *row["win_rate_ci"]),
        "reward": lambda row: f"{row.get('golden_reward', row.get('judge_reward')):+.2f}",
        "second judge's win rate": lambda row: f"{row.get('second_win_rate'):.3f}",
        "reverse KL, nats": lambda row: f"{row['reverse_kl']:.2f}",
        "length": lambda row: f"{row['response_length']:.1f}",
        "accuracy": lambda row: f"{row['accuracy']:.3f}",
        "log-ratio chosen / rejected": lambda row: f"{row['chosen_logratio']:+.1f} / {row['rejected_logratio']:+.1f}",
    }

    if not any(row.get("second_win_rate") is not None for row in rows):
        del columns["second judge's win rate"]

    def cell(form, row):
        try:
            return form(row)
        except TypeError:  # a value is None: there was no judge
            return "-"

    return aligned([list(columns)] + [[cell(form, row) for form in columns.values()] for row in rows])


def aligned(cells: list[list[str]]) -> str:
    """Rows of cells as lines of text, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def plot_curve(out, summary: dict, lines: list[dict]) -> None:
    """curve.png of one run: win rate and reverse KL against the step; where a reward is learned, also both rewards."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [line for line in lines if "reverse_kl" in line]
    steps = [line["step"] for line in points]
    color = COLORS.get(summary["algorithm"], "black")
    has_proxy = "proxy_reward" in lines[-1] and summary["golden_reward"] is not None
    figure, axes = plt.subplots(1, 2 + has_proxy, figsize=(4.5 * (2 + has_proxy), 3.4), layout="constrained")

    def draw(axis, name, label):
        axis.plot(steps, [line[name] for line in points], color=color, marker="o", markersize=3)
        axis.set_ylabel(label)

    if summary["win_rate"] is None:
        draw(axes[0], "accuracy", "accuracy on held-out pairs")
    else:
        draw(axes[0], "win_rate", "win rate against pi_ref")
        axes[0].fill_between(steps, *zip(*(line["win_rate_ci"] for line in points)), color=color, alpha=0.15, lw=0)
        axes[0].axhline(0.5, color="gray", lw=0.8, ls=":")
        if lines[-1].get("second_win_rate") is not None:
            axes[0].plot(steps, [line["second_win_rate"] for line in points], color="gray", lw=1)
            for name, ink in (("win_rate", color), ("second_win_rate", "gray")):
                axes[0].annotate("first judge" if ink == color else "second", (steps[-1], points[-1][name]), color=ink,
                                 xytext=(4, 0), textcoords="offset points", va="center")
            axes[0].set_xlim(right=1.25 * steps[-1])
    draw(axes[1], "reverse_kl", "KL(policy || pi_ref), nats a sequence")
    if has_proxy:
        draw(axes[2], "golden_reward", "mean reward")
        learned = [line["proxy_reward"] for line in lines[1:]]
        axes[2].plot(range(1, len(lines)), learned, color="gray", lw=1)
        for name, y, ink in (("golden", points[-1]["golden_reward"], color), ("learned", learned[-1], "gray")):
            axes[2].annotate(name, (steps[-1], y), color=ink, xytext=(4, 0), textcoords="offset points", va="center")
        axes[2].set_xlim(right=1.2 * steps[-1])
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{summary['algorithm']} on {Path(summary['model']).name}, beta {summary['beta']}, "
                    f"seed {summary['seed']}", fontsize=10)
    figure.savefig(Path(out) / "curve.png", dpi=130)
    plt.close(figure)


def plot_goodhart(runs: dict[str, list[dict]], names: dict[str, str], path) -> None:
    """Win rate against KL: a line a run, a point a checkpoint, the last one labelled.

    runs: directory -> its metrics lines. names: directory -> its algorithm, which decides the colour.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    ends = {}  # label -> ends of its lines: runs of one algorithm share a label
    for run, lines in runs.items():
        points = [line for line in lines if line.get("win_rate") is not None]
        x, y = [line["reverse_kl"] for line in points], [line["win_rate"] for line in points]
        if not points:  # run without a judge: it has no win rate to draw
            continue
        alone = list(names.values()).count(names[run]) == 1
        axis.plot(x, y, color=COLORS.get(names[run], "black"), marker="o", markersize=3, lw=1.2,
                  alpha=1.0 if alone else 0.5)
        ends.setdefault((Path(run).name if alone else names[run], names[run]), []).append((y[-1], x[-1]))
    for (label, name), points in ends.items():
        y, x = max(points)
        axis.annotate(label, (x, y), color=COLORS.get(name, "black"), fontsize=10, xytext=(6, 4),
                      textcoords="offset points", weight="bold")
    axis.axhline(0.5, color="gray", lw=0.8, ls=":")
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axis.margins(x=0.15)
    axis.set_xlim(left=0)
    axis.set_xlabel("KL(policy || pi_ref), nats a sequence (square-root scale)")
    axis.set_ylabel("win rate against pi_ref")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def against(run, opponent) -> tuple[float, float, float]:
    """(win rate, its 95 % interval) of one run's responses over another's, by the rewards both were given."""
    for path in (run, opponent):
        read_metrics(path)  # says so if it is not a run
    mine, theirs = (data.read_rows(Path(path) / "responses.jsonl") for path in (run, opponent))
    if [row["prompt"] for row in mine] != [row["prompt"] for row in theirs]:
        raise ValueError(f"{run} and {opponent} were evaluated on different prompts; give both the same --data, "
                         "--seed and --eval-samples")
    if any(row["reward"] is None for row in mine + theirs):
        raise ValueError(f"{run} or {opponent} was run without a judge; run it with --judge")
    rate, interval = win_rate([row["reward"] for row in mine], [row["reward"] for row in theirs])
    return rate, *interval


def measured_again(run, samples: int) -> dict:
    """The last line of metrics.jsonl as it is with more responses of the saved policy, which run/again/ then holds."""
    settings = read_settings(run)
    if not settings:
        raise ValueError(f"--samples: {run} is not finished, so there is no policy to measure again")
    args = argparse.Namespace(**{**settings, "out": Path(run) / "again"})
    with precision(args):
        s = set_up(args)
        args.eval_samples, learned = samples, Path(run) / "reward" / "model"
        judge = s.outcome or (load_judge(str(learned), args.device) if learned.is_dir() else None)
        evaluate = evaluator(args, s.ref, s.tokenizer, s.held_out_prompts, s.held_out, judge, s.second)
        line = {"step": args.steps, **evaluate(lm.load(str(Path(run) / "policy"), device=args.device)[0])}
    data.write_text(args.out / "metrics.jsonl", json.dumps(line) + "\n")
    return line


def mean_over_seeds(rows: list[dict]) -> dict:
    """One row for runs that differ only in their seed: means, and Student's 95 % interval of the win rate."""
    n = len(rows)
    mean = {key: sum(row[key] for row in rows) / n for key, value in rows[0].items()
            if isinstance(value, (int, float))}
    if mean.get("win_rate") is not None:
        _, half, _ = estimate([row["win_rate"] for row in rows])
        mean["win_rate_ci"] = mean["win_rate"] - half, mean["win_rate"] + half
    return {**rows[0], **mean, "step": rows[0]["step"], "run": f"{rows[0]['name']}, mean of {n} seeds"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories that hypo.py, dpo.py or rlhf.py wrote")
    parser.add_argument("--against", metavar="RUN", help="also the win rate against this run's responses")
    parser.add_argument("--samples", type=int, help="measure the saved policies again, on this many responses each")
    parser.add_argument("--out", default="goodhart.png", help="the picture (default goodhart.png)")
    args = parser.parse_args(argv)
    runs = {run: read_metrics(run) for run in args.runs}
    if args.samples:
        again = {run: measured_again(run, args.samples) for run in {**runs, args.against: None} if run}
        for run, lines in runs.items():
            lines[-1] = again[run]
    rows, groups, names = [], {}, {}
    for run, lines in runs.items():
        settings = read_settings(run)
        names[run] = settings.get("algorithm", Path(run).name)
        last = next(line for line in reversed(lines) if "reverse_kl" in line)
        rows.append({**last, "run": run, "name": names[run]})
        same = {key: value for key, value in settings.items() if key not in ("seed", "out", "resume")}
        groups.setdefault(json.dumps(same or run), []).append(rows[-1])
    first = next(iter(runs.values()))[0]
    print(table([{"run": "pi_ref", **first}, *rows, *(mean_over_seeds(g) for g in groups.values() if len(g) > 1)]))
    for run in runs if args.against else ():
        pair = [Path(path) / "again" if args.samples else path for path in (run, args.against)]
        print("{} against {}: win rate {:.3f} [{:.3f}, {:.3f}]".format(run, args.against, *against(*pair)))
    plot_goodhart(runs, names, args.out)
    print(f"\nwin rate against KL, a point a checkpoint: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")

"""From the evaluations of runs to a study's figures: statistics over seeds, verdicts, drawing, the pages of results.

`results` is everywhere a dict: run -> for each seed its evaluations, dicts of metrics, the first at step 0.
"""

import json
import math
import statistics
from pathlib import Path

import data
from eval import aligned, estimate

# ---------------------------------------------------------------------------------------------------
# statistics


WIN = "golden_win_rate_judges"  # the win rate against the golden baseline, on the prompts that pick nothing


def peak(results, arm: list) -> list[dict]:
    """For each seed the evaluation that one half of the prompts likes best, over all runs and steps of the arm.

    Its values ending in _judges are of the other half. Under "last", the last evaluation of the same run.
    """
    picked = []
    for seed in range(len(results[arm[0]])):
        candidates = [{**line, "last": results[run_][seed][-1]} for run_ in arm for line in results[run_][seed][1:]]
        picked.append(max(candidates, key=lambda line: line["golden_win_rate_picks"]))
    return picked


def last(results, run_) -> list[dict]:
    """The last evaluation of each seed."""
    return [lines[-1] for lines in results[run_]]


EDGES = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]  # of the bins of KL, nats a sequence


def envelope(results, arm: list) -> list[dict[int, float]]:
    """For each seed: bin of KL -> win rate against the golden baseline of the arm's best checkpoint in it."""
    by_seed = []
    for seed in range(len(results[arm[0]])):
        bins = {}
        for line in (line for run_ in arm for line in results[run_][seed][1:]):
            bins.setdefault(sum(line["reverse_kl"] >= edge for edge in EDGES), []).append(line)
        by_seed.append({i: max(lines, key=lambda line: line["golden_win_rate_picks"])[WIN]
                        for i, lines in bins.items() if 0 < i < len(EDGES)})
    return by_seed


def at_equal_kl(results, arm: list, other: list) -> list[dict[int, float]]:
    """For each seed: bin of KL that both arms reach -> difference of their envelopes there."""
    return [{i: a[i] - b[i] for i in sorted(a.keys() & b.keys())}
            for a, b in zip(envelope(results, arm), envelope(results, other))]


def reached(by_seed: list[dict[int, float]]) -> dict[tuple[float, float], list[float]]:
    """Bins of KL that at least four of five seeds reach: (low, high) edge -> the values of those seeds."""
    bins = {(EDGES[i - 1], EDGES[i]): [bins[i] for bins in by_seed if i in bins] for i in range(1, len(EDGES))}
    return {edges: values for edges, values in bins.items() if len(values) >= 0.8 * len(by_seed)}


def mean_over_bins(by_seed: list[dict[int, float]]) -> list[float]:
    return [sum(bins.values()) / len(bins) for bins in by_seed]


def cell(values: list[float], form: str = ".3f") -> str:
    """Mean and interval as text."""
    mean, half, _ = estimate(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]" if len(values) > 1 else f"{mean:{form}}"


def claim(paper: str, quantity: str, values: list[float], expected: str = "above 0", form: str = "+.3f") -> dict:
    """What a paper found, what came out here, by how many standard errors, and whether they agree.

    values: for each seed a quantity that by the paper is `expected`: "above 0", "below 0" or "not above 0".
    """
    mean, half, error = estimate(values)
    low, high = mean - half, mean + half
    if len(values) == 1:
        verdict = "not resolved"
    elif expected == "not above 0":
        verdict = "contradicted" if low > 0 else "not contradicted"
    else:
        side = 1 if expected == "above 0" else -1
        verdict = "holds" if min(side * low, side * high) > 0 else (
            "reversed" if max(side * low, side * high) < 0 else "not resolved")
    return {"paper": paper, "quantity": quantity, "expected": expected, "values": values, "mean": mean,
            "interval": [low, high], "standard_errors": mean / error if error > 0 else None, "verdict": verdict,
            "here": f"{quantity} {cell(values, form)}" + (f", {mean / error:+.1f} s.e." if error > 0 else "")}


def minus(a: list[dict], b: list[dict], name: str) -> list[float]:
    """Seed by seed."""
    return [x[name] - y[name] for x, y in zip(a, b, strict=True)]


def peak_row(label: str, results, arm: list) -> dict:
    """A line of a table: an arm's best checkpoints, and where their runs end."""
    best = peak(results, arm)
    return {"arm": label, "win rate against golden": cell([line[WIN] for line in best]),
            "against pi_ref": cell([line["win_rate_judges"] for line in best]),
            "at KL": cell([line["reverse_kl"] for line in best], ".1f"),
            "same run, last step": cell([line["last"][WIN] for line in best])}


# ---------------------------------------------------------------------------------------------------
# drawing

def style(figure, columns: int, height: float = 3.6, width: float = 4.2):
    """A row of axes; sizes in inches an axis."""
    figure.set_size_inches(width * columns, height)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return axes


def band(axis, xs, by_seed: list[list[float]], color: str, label: str = "", median=False, **line_style) -> None:
    """Mean over seeds with its 95 % interval, or the median with the seeds' range; the label at the line's end."""
    stats = [(statistics.median(values), min(values), max(values)) if median else
             (mean, mean - half, mean + half) for values in zip(*by_seed) for mean, half, _ in [estimate(values)]]
    middle, low, high = zip(*stats)
    axis.plot(xs, middle, color=color, **{"lw": 1.8, **line_style})
    axis.fill_between(xs, low, high, color=color, alpha=0.13, lw=0)
    label_end(axis, middle[-1], label, color)


def label_end(axis, y, label: str, color: str) -> None:
    """Remember a label; spread_labels writes them all where they do not touch."""
    if label:
        axis.labels = [*getattr(axis, "labels", []), (y, label, color)]


def spread_labels(axis) -> None:
    """Write the labels of the lines' ends to the right of the axis, at least a line's height apart."""
    to_axes = axis.transData + axis.transAxes.inverted()
    at, heights = -math.inf, []
    labels = sorted(getattr(axis, "labels", []))
    for y, *_ in labels:
        heights.append(at := max(to_axes.transform((axis.get_xlim()[0], y))[1], at + 0.07))
    too_high = max(0.0, at - 1)
    for (_, label, color), y in zip(labels, heights):
        axis.annotate(label, (1.01, y - too_high), xycoords="axes fraction", color=color, fontsize=9, va="center",
                      annotation_clip=False)


def along(axis, results, run_, name: str, color: str, label: str = "", **line_style) -> None:
    """A quantity against the step; of the KL, which is skewed, the median."""
    steps = [line["step"] for line in results[run_][0]]
    by_seed = [[line[name] for line in lines] for lines in results[run_]]
    band(axis, steps, by_seed, color, label, median=name == "reverse_kl", **line_style)
    axis.set_xlabel("step")


def draw_bins(axis, by_seed: list[dict[int, float]], color: str, label: str = "") -> None:
    """Mean and interval in every bin of KL that most seeds reach."""
    bins = reached(by_seed)
    xs = [math.sqrt(low * high) for low, high in bins]
    stats = [estimate(values) for values in bins.values()]
    axis.plot(xs, [mean for mean, _, _ in stats], color=color, lw=1.8)
    axis.fill_between(xs, [m - h for m, h, _ in stats], [m + h for m, h, _ in stats], color=color, alpha=0.13, lw=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("KL(policy || pi_ref), nats a sequence")
    label_end(axis, stats[-1][0], label, color)


def draw_envelope(axis, results, arm: list, color: str, label: str, dots: bool = False) -> None:
    """The best win rate in each bin of KL; with dots, every checkpoint, too."""
    draw_bins(axis, envelope(results, arm), color, label)
    axis.set_ylabel("win rate against the golden baseline")
    if dots:
        points = [line for run_ in arm for lines in results[run_] for line in lines[1:]]
        axis.scatter([line["reverse_kl"] for line in points], [line[WIN] for line in points], s=5, color=color,
                     alpha=0.35, lw=0)
        axis.set_xlim(EDGES[0] / 2, EDGES[-1])
    axis.set_ylim(bottom=0)


def draw_dots(axis, rows: list[tuple[str, list[float], str]], xlabel: str) -> None:
    """One line a row: every seed as a dot, the mean with its interval; the first row on top."""
    for y, (_, values, color) in enumerate(rows):
        mean, half, _ = estimate(values)
        axis.scatter(values, [y] * len(values), s=12, color=color, alpha=0.4, lw=0)
        axis.errorbar(mean, y, xerr=0 if half != half else half, color=color, marker="o", ms=6, lw=1.6, capsize=3)
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(xlabel)


# ---------------------------------------------------------------------------------------------------
# pages

def as_text(rows: list[dict]) -> str:
    """A table for the terminal."""
    return aligned([list(rows[0])] + [list(row.values()) for row in rows])


def as_markdown(report: dict) -> str:
    """A study's part of results/README.md, from its JSON."""
    columns = list(report["table"][0])
    return "\n".join([
        f"## {report['study']}", "", f"**{report['title']}** `{report['command']}`, seeds {report['seeds'][0]} to "
        f"{report['seeds'][-1]}; {report['core-minutes']:.0f} minutes of training on one core ({report['hardware']}).",
        "", f"![{report['title']}]({report['study']}.png)", "",
        "| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(row.values()) + " |" for row in report["table"]), "",
        *(f"- {sentence(line, '**')}" for line in report["claims"])]) + "\n"


def sentence(line: dict, bold: str = "") -> str:
    """A claim in words."""
    here = f"Here: {line['here']}" if line["paper"] else line["here"]
    return f"{line['paper']} {here}: {bold}{line['verdict']}{bold}.".strip()


def verdicts(report: dict) -> str:
    """A study's rows in the README's table; what only continues a claim is left to results/README.md."""
    link = f"[{report['study']}](results/README.md#{report['study']})"
    claims = [line for line in report["claims"] if line["paper"][:1].isupper()]
    return "\n".join(f"| {link if i == 0 else ''} | {line['paper']} | {line['here']} | {line['verdict']} |"
                     for i, line in enumerate(claims))


BEGIN, END = "<!-- written by study.py from results/*.json: begin -->", "<!-- end -->"


def write_readmes(root: Path, names: list[str]) -> None:
    """results/README.md, and the table of verdicts between two marks of README.md, from results/*.json."""
    files = [root / "results" / f"{name}.json" for name in names]
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    data.write_text(root / "results" / "README.md", RESULTS_HEAD + "\n" + "\n".join(map(as_markdown, reports)))
    before, _, rest = (root / "README.md").read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    head = "| study | a paper found | here | verdict |\n| --- | --- | --- | --- |"
    table = "\n".join([head, *map(verdicts, reports)])
    data.write_text(root / "README.md", f"{before}{BEGIN}\n{table}\n{END}{after}")


RESULTS_HEAD = """# Results of the studies

Written by `python study.py`, from the JSON files beside this page, which also hold every evaluation of every run.
Means over seeds with Student's 95 % interval; s.e. is the standard error. "Golden" is the golden baseline, a policy
trained online on the golden reward itself. "At KL" is where the best checkpoint is, in nats a sequence; one half of the
held-out prompts picks it, the other half judges it.
"""

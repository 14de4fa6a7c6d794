"""Statistics over seeds: intervals, the best checkpoints of a sweep, arms at equal KL, verdicts."""

import functools
import json
import math
import statistics

from eval import read_metrics, read_summary
from experiments.setting import Run
from run import json_object

WIN = "golden_win_rate_judges"  # the win rate against the golden baseline, on the prompts that pick nothing
EDGES = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]  # of the bins of KL, nats a sequence
Arms = dict[str, list[Run]]  # an arm is a sweep of runs
Bins = dict[int, float]  # number of a bin of KL -> a value there


class Results:
    """A study's report, as in results/NAME.json.

    results[run] has for each seed its evaluations: dicts of metrics, the first of step 0. `beside` is all of the
    report, with what some studies need beside the evaluations. A list of values has one value for each seed.
    """

    def __init__(self, report: dict):
        self.beside = report

    def __getitem__(self, run: Run) -> list[list[dict]]:
        return self.beside["evaluations"][run.name]

    def checkpoints(self, arm: list[Run]) -> list[list[dict]]:
        """For each seed all evaluations of the arm but those of step 0; under "last", the run's last one."""
        return [[{**line, "last": lines[-1]} for lines in of_seed for line in lines[1:]]
                for of_seed in zip(*(self[run] for run in arm))]

    def peak(self, arm: list[Run]) -> list[dict]:
        """For each seed the evaluation that one half of the prompts likes best, over all runs and steps of the arm.

        Its values ending in _judges are of the other half.
        """
        return [max(lines, key=picks) for lines in self.checkpoints(arm)]

    def peaks(self, arms: Arms) -> dict[str, list[float]]:
        """Arm -> the win rates against the golden baseline at the arm's peaks."""
        return {label: column(self.peak(arm), WIN) for label, arm in arms.items()}

    def last(self, run: Run, name: str) -> list[float]:
        """A metric at the last step."""
        return [lines[-1][name] for lines in self[run]]

    def change(self, run: Run, other: Run, name: str) -> list[float]:
        """A metric of a run at the last step, minus that of another."""
        return minus(self.last(run, name), self.last(other, name))

    def row(self, label: str, arm: list[Run]) -> dict[str, str]:
        """A line of a table: an arm's best checkpoints, and where their runs end."""
        best = self.peak(arm)
        return {"arm": label, "win rate against golden": cell(column(best, WIN)),
                "against pi_ref": cell(column(best, "win_rate_judges")),
                "at KL": cell(column(best, "reverse_kl"), ".1f"),
                "same run, last step": cell([line["last"][WIN] for line in best])}

    def envelope(self, arm: list[Run]) -> list[Bins]:
        """For each seed: bin of KL -> win rate against the golden baseline of the arm's best checkpoint in it."""
        by_seed = []
        for checkpoints in self.checkpoints(arm):
            bins: dict[int, list[dict]] = {}
            for line in checkpoints:
                bins.setdefault(sum(line["reverse_kl"] >= edge for edge in EDGES), []).append(line)
            by_seed.append({i: max(lines, key=picks)[WIN] for i, lines in bins.items() if 0 < i < len(EDGES)})
        return by_seed

    def at_equal_kl(self, arm: list[Run], other: list[Run]) -> list[Bins]:
        """For each seed: bin of KL that both arms reach -> difference of their envelopes there."""
        return [{i: a[i] - b[i] for i in sorted(a.keys() & b.keys())}
                for a, b in zip(self.envelope(arm), self.envelope(other))]


def picks(line: dict) -> float:
    """What picks a checkpoint: the win rate on the prompts that do not judge."""
    return line["golden_win_rate_picks"]


def column(lines: list[dict], name: str) -> list[float]:
    """One metric of some evaluations."""
    return [line[name] for line in lines]


def minus(a: list[float], b: list[float]) -> list[float]:
    """Seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def reached(by_seed: list[Bins]) -> dict[tuple[float, float], list[float]]:
    """Bins of KL that at least four of five seeds reach: (low, high) edge -> the values of those seeds."""
    bins = {(EDGES[i - 1], EDGES[i]): [bins[i] for bins in by_seed if i in bins] for i in range(1, len(EDGES))}
    return {edges: values for edges, values in bins.items() if len(values) >= 0.8 * len(by_seed)}


def mean_over_bins(by_seed: list[Bins]) -> list[float]:
    """Of a seed without a bin, nothing."""
    return [statistics.fmean(bins.values()) for bins in by_seed if bins]


# ---------------------------------------------------------------------------------------------------
# intervals and verdicts

@functools.cache
def student_95(df: int) -> float:
    """The t that |T| exceeds with probability 0.05, T of Student's distribution with df degrees of freedom."""
    def within(t: float) -> float:  # P(|T| <= t), Abramowitz and Stegun 26.7.3 and 26.7.4
        theta, odd = math.atan(t / math.sqrt(df)), df % 2
        cosine = math.cos(theta)
        term = total = 0.0 if df == 1 else cosine if odd else 1.0
        for j in range(3 if odd else 2, df, 2):
            term *= cosine**2 * (j - 1) / j
            total += term
        return (2 / math.pi) * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, 20.0  # the largest is 12.7, at df = 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return high


def estimate(values: list[float]) -> tuple[float, float, float]:
    """(mean, half of Student's 95 % interval, standard error) over seeds; one seed has no interval, none no mean."""
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, student_95(len(values) - 1) * error, error


def cell(values: list[float], form: str = ".3f") -> str:
    """Mean and interval as text."""
    if not values:
        return "no seed has one"
    mean, half, _ = estimate(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]" if len(values) > 1 else f"{mean:{form}}"


def claim(paper: str, quantity: str, values: list[float], expected: str = "above 0", form: str = "+.3f") -> dict:
    """What a paper found, what came out here, by how many standard errors, and whether they agree.

    values: for each seed a quantity that by the paper is `expected`: "above 0", "below 0" or "not above 0".
    """
    mean, half, error = estimate(values)
    low, high = mean - half, mean + half
    if len(values) < 2:
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


# ---------------------------------------------------------------------------------------------------
# any runs

def mean_over_seeds(rows: list[dict]) -> dict:
    """One row of eval.table for runs that differ only in their seed: means, and the interval of the win rate."""
    mean: dict = {key: statistics.fmean(row[key] for row in rows) for key, value in rows[0].items()
                  if isinstance(value, (int, float))}
    if mean.get("win_rate") is not None:
        middle, half, _ = estimate(column(rows, "win_rate"))
        mean["win_rate_ci"] = middle - half, middle + half
    return {**rows[0], **mean, "step": rows[0]["step"], "run": f"{rows[0]['name']}, mean of {len(rows)} seeds"}


def rows_of_runs(directories: list[str]) -> list[dict]:
    """Rows of eval.table: the last evaluation of each run, and the means of those that differ only in their seed."""
    rows: list[dict] = []
    groups: dict[str, list[dict]] = {}
    for directory in directories:
        last = next(line for line in reversed(read_metrics(directory)) if "reverse_kl" in line)
        settings = json_object(read_summary(directory).get("settings", {"out": directory}),
                               f"{directory}/summary.json: field 'settings'")
        rows.append({**last, "run": directory, "name": settings.get("algorithm", directory)})
        groups.setdefault(json.dumps({**settings, "seed": None}), []).append(rows[-1])
    return rows + [mean_over_seeds(group) for group in groups.values() if len(group) > 1]

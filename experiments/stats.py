"""Statistics over seeds: intervals, arms at a fixed KL, verdicts."""

import functools
import json
import math
import os
import statistics
from collections.abc import Sequence

import torch

from eval import read_metrics, read_summary
from experiments.setting import Run
from run import json_object

WIN = "golden_win_rate"
Arms = dict[str, list[Run]]  # an arm is a sweep of beta


class Results:
    """A study's report, as in results/NAME.json.

    results[run] has for each seed its evaluations: dicts of metrics, the first of step 0. `beside` is all of the
    report, with what some studies need beside the evaluations. A list of values has one value for each seed, None
    where a seed has none.
    """

    def __init__(self, report: dict):
        self.beside = report

    def __getitem__(self, run: Run) -> list[list[dict]]:
        return self.beside["evaluations"][run.name]

    def checkpoints(self, arm: list[Run]) -> list[dict]:
        """All evaluations of an arm, of all seeds, but those of step 0."""
        return [line for run in arm for lines in self[run] for line in lines[1:]]

    def last(self, run: Run, name: str) -> list[float]:
        """A metric at the last step."""
        return [lines[-1][name] for lines in self[run]]

    def change(self, run: Run, other: Run, name: str) -> list[float]:
        """A metric of a run at the last step, minus that of another."""
        return minus(self.last(run, name), self.last(other, name))

    def at_kl(self, arm: list[Run], kl: float, name: str) -> list[float | None]:
        """For each seed a metric at a KL: on the line between the two runs of the arm that end on either side of it.

        The line is over log KL. None for a seed whose runs all end on one side. Only last steps count: checkpoints on
        the way are not settled.
        """
        found: list[float | None] = []
        for of_seed in zip(*(self[run] for run in arm)):
            ends = sorted((lines[-1]["reverse_kl"], lines[-1][name]) for lines in of_seed)
            between = [(a, b) for a, b in zip(ends, ends[1:]) if a[0] <= kl <= b[0]]
            found.append(None)
            if between:
                (low, left), (high, right) = between[0]
                share = math.log(kl / low) / math.log(high / low) if high > low else 0.5
                found[-1] = left + share * (right - left)
        return found

    def change_at_kl(self, arm: list[Run], other: list[Run], kl: float, name: str) -> list[float]:
        """The difference of two arms there, in the seeds in which both reach it."""
        both = zip(self.at_kl(arm, kl, name), self.at_kl(other, kl, name))
        return [a - b for a, b in both if a is not None and b is not None]


def column(lines: list[dict], name: str) -> list[float]:
    """One metric of some evaluations."""
    return [line[name] for line in lines]


def minus(a: list[float], b: list[float]) -> list[float]:
    """Seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


# ---------------------------------------------------------------------------------------------------
# intervals

def student_within(t: float, df: int) -> float:
    """P(|T| <= t), T of Student's distribution with df degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta, odd = math.atan(t / math.sqrt(df)), df % 2
    cosine = math.cos(theta)
    term = total = 0.0 if df == 1 else cosine if odd else 1.0
    for j in range(3 if odd else 2, df, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    return (2 / math.pi) * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


@functools.cache
def student_95(df: int) -> float:
    """The t that |T| exceeds with probability 0.05."""
    low, high = 0.0, 20.0  # the largest is 12.7, at df = 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, df) < 0.95 else (low, middle)
    return high


def estimate(values: list[float]) -> tuple[float, float, float]:
    """(mean, half of Student's 95 % interval, standard error) over seeds; one seed has no interval, none no mean."""
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, student_95(len(values) - 1) * error, error


def interval(values: list[float], is_share: bool = False) -> tuple[float, float]:
    """Student's 95 % interval; of a share on the scale of log-odds, on which it cannot leave [0, 1]."""
    mean, half, _ = estimate(values)
    if not is_share or not 0 < mean < 1 or math.isnan(half):
        return mean - half, mean + half
    middle, half = math.log(mean / (1 - mean)), half / (mean * (1 - mean))  # the slope of the log-odds
    return tuple(1 / (1 + math.exp(-x)) for x in (middle - half, middle + half))  # type: ignore[return-value]


def cell(values: Sequence[float | None], form: str = ".3f", is_share: bool = False) -> str:
    """Mean and interval as text, and how many seeds have a value if not all."""
    there = [value for value in values if value is not None]
    if not there:
        return "no seed has one"
    low, high = interval(there, is_share)
    text = f"{statistics.fmean(there):{form}}" + f" [{low:{form}}, {high:{form}}]" * (len(there) > 1)
    return text + f" ({len(there)} of {len(values)} seeds)" * (len(there) < len(values))


def share(values: Sequence[float | None], form: str = ".3f") -> str:
    """`cell` of a win rate, an accuracy or another share."""
    return cell(values, form, is_share=True)


# ---------------------------------------------------------------------------------------------------
# verdicts

def claim(paper: str, quantity: str, values: list[float], expected: str = "above", margin: float = 0.03,
          form: str = "+.3f") -> dict:
    """What a paper says, and for each seed a quantity that by the paper is `expected`: above 0, below 0, or equal.

    equal: nearer to 0 than the margin. `decide` adds the verdict, which needs all claims of the study.
    """
    mean, half, error = estimate(values)
    return {"paper": paper, "quantity": quantity, "expected": expected, "margin": margin, "values": values,
            "mean": mean, "interval": [mean - half, mean + half], "p": p_not_zero(mean, error, len(values)),
            "p_equal": p_not_within(mean, error, len(values), margin),
            "here": f"{quantity} {cell(values, form)}"}


def p_not_zero(mean: float, error: float, n: int) -> float:
    """Student's two-sided test of mean 0; 1 with less than two seeds."""
    if n < 2:
        return 1.0
    return 1 - student_within(abs(mean) / error, n - 1) if error else float(mean == 0)


def p_not_within(mean: float, error: float, n: int, margin: float) -> float:
    """Two one-sided tests: of a mean at -margin or below, and at margin or above; the larger p of the two."""
    if n < 2:
        return 1.0
    room = margin - abs(mean)
    tail = (1 - student_within(abs(room) / error, n - 1)) / 2 if error else 0.0
    return tail if room > 0 else 1 - tail


def holm(ps: list[float]) -> list[float]:
    """Holm's adjusted p-values: below alpha for some true hypothesis with probability alpha at most."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def decide(claims: list[dict]) -> None:
    """Give the claims of a study their verdicts, corrected for their number by Holm.

    holds; reversed, on the other side of 0; equal, within the margin; different, where equal was expected; or open,
    with the number of seeds that would find such a mean with probability 0.8, at the level of Holm's first step.
    """
    for line, p, p_equal in zip(claims, holm(column(claims, "p")), holm(column(claims, "p_equal"))):
        side, expected = "above" if line["mean"] > 0 else "below", line["expected"]
        if expected == "equal":
            found = "equal" if p_equal < 0.05 else side if p < 0.05 else "open"
        else:
            found = side if p < 0.05 else "equal" if p_equal < 0.05 else "open"
        line["p_holm"], line["p_equal_holm"] = p, p_equal
        line["verdict"] = "holds" if found == expected else (
            "open" + seeds_needed(line["values"], len(claims)) if found == "open" else
            f"equal within {line['margin']:g}" if found == "equal" else
            "different" if expected == "equal" else "reversed")


def seeds_needed(values: list[float], claims: int) -> str:
    """How many seeds find a difference as large as these show, with probability 0.8, beside so many claims.

    ((z + 0.84) sd / mean)^2, with the z of the corrected level: 1.96 for one claim.
    """
    if len(values) < 3 or not statistics.fmean(values):  # two say nothing of their spread
        return ""
    z = sum(map(statistics.NormalDist().inv_cdf, (1 - 0.025 / claims, 0.8)))
    n = (z * statistics.stdev(values) / statistics.fmean(values)) ** 2 + 2  # 2 for Student's wider tails
    return f": {math.ceil(n)} seeds would tell" if n < 200 else ": more than 200 seeds would tell"


def hardware(device: str) -> str:
    """What a study ran on."""
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return f"{chip}, torch {torch.__version__.partition('+')[0]}"


def as_json(report: dict) -> str:
    """A report with five digits a number, and null for NaN: one seed has no interval."""
    def five_digits(text: str) -> float:
        return float(f"{float(text):.5g}")

    def null(text: str) -> None:
        pass

    return json.dumps(json.loads(json.dumps(report), parse_float=five_digits, parse_constant=null)) + "\n"


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

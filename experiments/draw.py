"""Drawing helpers of the studies' pictures: means over seeds with their bands, and labels joined to their lines."""

import math
import statistics
from collections.abc import Sequence

from eval import COLORS, panels
from experiments.setting import Run
from experiments.stats import EDGES, WIN, Bins, Results, estimate, reached

RED, TEAL, GRAY = COLORS["online ipo"], COLORS["ipo"], "#6b7280"
KL = "KL(policy || pi_ref), nats a sequence"
ROOT_KL = "KL(policy || pi_ref), nats (square-root scale)"
GOLDEN_WIN = "win rate against the golden baseline"


def label_at(axis, x: float, y: float, label: str, color: str) -> None:
    """Remember the label of a line's point (x, y); write_labels writes them all where they do not touch."""
    if label:
        axis.labels = [*getattr(axis, "labels", []), (y, x, label, color)]


def write_labels(axis, gap: float = 0.065) -> None:
    """Write the labels to the right of the axis, in the order of their points, each joined to its point."""
    to_axes = axis.transData + axis.transAxes.inverted()
    labels = sorted(getattr(axis, "labels", []))
    heights = [float(to_axes.transform((x, y))[1]) for y, x, *_ in labels]
    for _ in range(200):  # neighbours that are too close push each other apart
        for i in range(len(heights) - 1):
            push = max(0.0, gap - (heights[i + 1] - heights[i])) / 2
            heights[i], heights[i + 1] = heights[i] - push, heights[i + 1] + push
    for (y, x, label, color), height in zip(labels, heights):
        axis.annotate(label, (x, y), (1.05, height), textcoords="axes fraction", color=color, fontsize=9, va="center",
                      annotation_clip=False, arrowprops=dict(arrowstyle="-", color=color, lw=0.6, alpha=0.7,
                                                             relpos=(0, 0.5), shrinkA=0, shrinkB=1))


def band(axis, xs, by_seed, color: str, label: str = "", median: bool = False, **line_style) -> None:
    """Mean over seeds with its 95 % interval, or the median with the seeds' range; the label at the end.

    by_seed: for each seed a value at each of xs.
    """
    xs, stats = list(xs), []
    for values in zip(*by_seed):
        mean, half, _ = estimate(list(values))
        stats.append((statistics.median(values), min(values), max(values)) if median
                     else (mean, mean - half, mean + half))
    draw_band(axis, xs, stats, color, **line_style)
    label_at(axis, xs[-1], stats[-1][0], label, color)


def draw_band(axis, xs, stats, color: str, **line_style) -> None:
    """A line and a band around it. stats: (middle, low, high) at each of xs."""
    middle, low, high = zip(*stats)
    axis.plot(xs, middle, color=color, **{"lw": 1.8, **line_style})
    axis.fill_between(xs, low, high, color=color, alpha=0.12, lw=0)


def along(axis, results: Results, run: Run, name: str, color: str, label: str = "", **line_style) -> None:
    """A quantity against the step; of the KL, which is skewed, the median."""
    steps, by_seed = ([[line[key] for line in lines] for lines in results[run]] for key in ("step", name))
    band(axis, steps[0], by_seed, color, label, median=name == "reverse_kl", **line_style)
    axis.margins(x=0.01)


def root_scale(axis) -> None:
    """A y axis from 0 on which one band that goes far up leaves the others room."""
    axis.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda root: root**2))
    axis.set_ylim(0)


def win_and_kl(results: Results, runs: dict[str, Run], colors):
    """Two panels: win rate along training, and KL with the names of the runs."""
    figure, axes = panels([GOLDEN_WIN, ROOT_KL], "step")
    for (label, run), color in zip(runs.items(), colors):
        along(axes[0], results, run, WIN, color)
        along(axes[1], results, run, "reverse_kl", color, label)
    root_scale(axes[1])
    return figure


def bins(axis, by_seed: list[Bins], color: str, label: str = "") -> None:
    """Mean and interval in every bin of KL that most seeds reach; the label at the highest mean."""
    middles, stats = [], []
    for (low, high), values in reached(by_seed).items():
        mean, half, _ = estimate(values)
        middles.append(math.sqrt(low * high))
        stats.append((mean, mean - half, mean + half))
    if stats:
        draw_band(axis, middles, stats, color)
        y, x = max((mean, x) for x, (mean, _, _) in zip(middles, stats))
        label_at(axis, x, y, label, color)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(KL)


def envelope(axis, results: Results, arm: list[Run], color: str, label: str, dots: bool = False) -> None:
    """The best win rate in each bin of KL; with dots, every checkpoint, too."""
    bins(axis, results.envelope(arm), color, label)
    if dots:
        points = [(line["reverse_kl"], line[WIN]) for lines in results.checkpoints(arm) for line in lines]
        axis.scatter(*zip(*points), s=5, color=color, alpha=0.35, lw=0)
        axis.set_xlim(EDGES[0] / 2, EDGES[-1])
    axis.set_ylim(bottom=0)


def rows(axis, values: dict[str, list[float]], colors: Sequence[str], xlabel: str) -> None:
    """A row each: every seed as a small dot, the mean as a large one with its interval; the first row on top."""
    for y, (of_seeds, color) in enumerate(zip(values.values(), colors)):
        mean, half, _ = estimate(of_seeds)
        axis.scatter(of_seeds, [y - 0.15] * len(of_seeds), s=14, color=color, alpha=0.5, lw=0)
        whiskers(axis, mean, y, color, xerr=half, marker="o")
    axis.set_yticks(range(len(values)), values)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlabel(xlabel)


def whiskers(axis, x: float, y: float, color: str, marker: str, **halves: float) -> None:
    """A dot with an interval; one seed has none."""
    shown = {name: half for name, half in halves.items() if not math.isnan(half)}
    axis.errorbar(x, y, color=color, marker=marker, ms=6, lw=1.6, capsize=3, **shown)


def zero_line(axis) -> None:
    axis.axhline(0, color="gray", lw=0.8, ls=":")

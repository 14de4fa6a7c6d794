"""Drawing helpers of the studies' pictures: means over seeds with their bands, and labels joined to their lines."""

import statistics

from eval import COLORS, ROOT_SCALE, panels
from experiments.setting import Run
from experiments.stats import WIN, Results, column, estimate

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
    axis.set_yscale(**ROOT_SCALE)
    axis.set_ylim(0)


def win_and_kl(results: Results, runs: dict[str, Run], colors):
    """Two panels: win rate along training, and KL with the names of the runs."""
    figure, axes = panels([GOLDEN_WIN, ROOT_KL], "step")
    for (label, run), color in zip(runs.items(), colors):
        along(axes[0], results, run, WIN, color)
        along(axes[1], results, run, "reverse_kl", color, label)
    root_scale(axes[1])
    return figure


def settled(axis, results: Results, arm: list[Run], name: str, color: str, label: str = "", dots: bool = True,
            **line_style) -> None:
    """A metric against KL: dots are checkpoints; the line is the mean over seeds between the last steps of the runs.

    It goes as far as all seeds reach. One run alone has a point, where it ends.
    """
    if dots:
        points = results.checkpoints(arm)
        axis.scatter(column(points, "reverse_kl"), column(points, name), s=4, color=color, alpha=0.25, lw=0)
    ends = list(zip(*([lines[-1]["reverse_kl"] for lines in results[run]] for run in arm)))  # seeds x runs
    low, high = max(map(min, ends)), min(map(max, ends))
    if len(arm) > 1 and low < high:
        kls = [low + (high - low) * i / 24 for i in range(25)]
        kls[-1] = high  # not above it by rounding
        band(axis, kls, zip(*(results.at_kl(arm, kl, name) for kl in kls)), color, label, **line_style)
        kl_scale(axis)
    else:
        for run in arm:
            end(axis, results, run, name, color, label if run is arm[-1] else "")


def end(axis, results: Results, run: Run, name: str, color: str, label: str) -> None:
    """Where each seed's run ends, and their mean."""
    kls, values = results.last(run, "reverse_kl"), results.last(run, name)
    axis.scatter(kls, values, s=14, color=color, alpha=0.5, lw=0)
    axis.plot(statistics.fmean(kls), statistics.fmean(values), color=color, marker="D", ms=6)
    label_at(axis, statistics.fmean(kls), statistics.fmean(values), label, color)
    kl_scale(axis)


def kl_scale(axis) -> None:
    """A KL axis by doublings."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")


def frontier(axis, results: Results, name: str) -> None:
    """The best win rate at each KL that is on the axis; name: of the metric."""
    low, high = axis.get_xlim()
    points = [(kl, rates[name]) for kl, rates in results.beside["frontier"] if low <= kl <= high]
    if points:
        axis.plot(*zip(*points), color="black", lw=1.0, ls="--", zorder=1)
        label_at(axis, *points[-1], "best possible", "black")
    axis.set_xlim(low, high)


def zero_line(axis) -> None:
    axis.axhline(0, color="gray", lw=0.8, ls=":")

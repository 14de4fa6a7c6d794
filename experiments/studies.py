"""The studies: which runs each makes, what it asks of them, and its picture.

Declared before the runs. Each study's docstring names its question and its claims; the first claim is the primary one,
what is not a claim is exploratory. For all:

    seeds       10 to 19, which chose nothing: the rates are of a sweep on seeds 100 to 103 (docs/details.md), the
                betas and KLs of one run each on seed 1000. Studies that only ask whether a finding stays in another
                setting have 10 to 15: six find 0.06 at the standard deviation of 0.04 that fifteen earlier seeds had
    runs        100 steps of 64 pairs, AdamW from 1e-3 (HyPO 2e-3, PPO 4e-3: the defaults of their commands), decayed in
                a line to 0; 2000 pairs, for HyPO against DPO 400
    endpoint    the last step: the same settings of both arms, or both arms at KL_FIXED nats by interpolation between
                the last steps of their sweeps of beta; paired within a seed, for arms share pairs, proxy and opponents
    measures    win rate against the golden baseline or pi_ref, golden reward, KL, `off_support`, on 512 responses
    margins     what is nearer to 0 counts as equal: 0.03 of a win rate, 0.01 of off_support, 0.1 of a log
    verdict     Student's test over seeds, corrected by Holm for the claims of the study

Both arms of a comparison get the same sweep. No checkpoint is picked: no figure is a maximum.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from eval import COLORS, panels
from experiments import draw
from experiments.draw import GOLDEN_WIN, GRAY, KL, RED, ROOT_KL, TEAL
from experiments.setting import CLASSIFY, EARLY, FINAL, OFFLINE, Run, setting_of
from experiments.stats import WIN, Arms, Results, cell, claim, column, minus, share

BETAS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
AROUND = (0.05, 0.1, 0.15)  # in every arm of main they enclose KL_FIXED
FEW = (0.05, 0.1, 0.2)  # of the sweeps of secondary studies
KL_FIXED = 4.0  # nats
Concluded = tuple[list[dict], list[dict]]  # rows of a table, claims


def sweep(algorithm: str, source: str = "offline", betas=FEW, **others) -> list[Run]:
    """Runs that differ in beta."""
    return [Run(algorithm, source, beta, **others) for beta in betas]


def flat(arms: Arms) -> list[Run]:
    """All runs of some arms."""
    return list(chain.from_iterable(arms.values()))


def row(results: Results, label: str, run: Run) -> dict[str, str]:
    """A line of a table: where a run ends."""
    return {"run": label, "win rate against golden": share(results.last(run, WIN)),
            "against pi_ref": share(results.last(run, "win_rate")),
            "golden reward": cell(results.last(run, "golden_reward"), ".2f"),
            "by the proxy": cell(results.last(run, "sampled_proxy_reward"), ".2f"),
            "KL": cell(results.last(run, "reverse_kl"), ".1f"), "off support": share(results.last(run, "off_support"))}


def row_at_kl(results: Results, label: str, arm: list[Run], kl: float = KL_FIXED) -> dict[str, str]:
    """A line of a table: an arm at a fixed KL."""
    return {"arm": label, f"win rate against golden at {kl:g} nats": share(results.at_kl(arm, kl, WIN)),
            "against pi_ref": share(results.at_kl(arm, kl, "win_rate")),
            "golden reward": cell(results.at_kl(arm, kl, "golden_reward"), ".2f"),
            "off support": share(results.at_kl(arm, kl, "off_support")),
            "KLs of its runs": " ".join(f"{statistics.fmean(results.last(run, 'reverse_kl')):.1f}" for run in arm)}


def row_at_end(results: Results, label: str, run: Run, kl: float = KL_FIXED) -> dict[str, str]:
    """A line of the same table for a run that has no sweep: where it ends."""
    measured = row(results, label, run)
    names = "win rate against golden", "against pi_ref", "golden reward", "off support", "KL"
    headers = f"win rate against golden at {kl:g} nats", *names[1:4], "KLs of its runs"
    return {"arm": f"{label}, last step", **{header: measured[name] for header, name in zip(headers, names)}}


def proxy_accuracy(results: Results, run: Run) -> list[float]:
    """Of the reward model of a run's setting, on held-out pairs."""
    return results.beside[f"{setting_of(run).name} accuracy"]


def log_kl(results: Results, run: Run, other: Run) -> list[float]:
    """log of the ratio of two runs' KL at the last step."""
    return minus(*([math.log(kl) for kl in results.last(one, "reverse_kl")] for one in (run, other)))


# ---------------------------------------------------------------------------------------------------
# the five primary claims

PRIMARY: Arms = {"online": sweep("ipo", "online", AROUND), "offline": sweep("ipo", "offline", AROUND),
                 "shuffled": sweep("ipo", "replay", AROUND, window=0)}  # the online runs' pairs, in a random order
ROUNDS = {n: Run("ipo", "iterative", rounds=n) for n in (1, 2, 4, 8)}
DPO, HYPO = Run("dpo", pairs=0.2), Run("hypo", lam=0.004, lr=2.0, pairs=0.2)


def main(results: Results) -> Concluded:
    """What the slides end with: on-policy data, in some form, lead to better performance.

    Online against offline IPO at 4 nats: win rate against golden, and off_support. Online against its own pairs
    shuffled, likewise. Eight rounds against one, beta 0.1, both with 6400 labelled pairs in all. HyPO against DPO on
    400 pairs: win rate against pi_ref.
    """
    def at_kl(arm: str, name: str) -> list[float]:
        return results.change_at_kl(PRIMARY["online"], PRIMARY[arm], KL_FIXED, name)

    rows = [row_at_kl(results, f"{label} IPO", arm) for label, arm in PRIMARY.items()]
    rows += [row_at_end(results, label, run) for label, run in (
        ("one round", ROUNDS[1]), ("eight rounds", ROUNDS[8]), ("HyPO, 400 pairs", HYPO), ("DPO, 400 pairs", DPO))]
    claims = [
        claim("Online beats offline at equal KL.", "win rate at 4 nats, online minus offline,", at_kl("offline", WIN)),
        claim("The offline policy leaves what pi_ref covers.",
              "off support at 4 nats, online minus offline,", at_kl("offline", "off_support"), "below", 0.01),
        claim("It is not the data: the online pairs, shuffled, do less.",
              "win rate at 4 nats, online minus shuffled,", at_kl("shuffled", WIN)),
        claim("Iterative training suffices: pairs in rounds beat as many from pi_ref.",
              "win rate, eight rounds minus one,", results.change(ROUNDS[8], ROUNDS[1], WIN)),
        claim("HyPO beats DPO on the same pairs.", "win rate against pi_ref, 400 pairs,",
              results.change(HYPO, DPO, "win_rate")),
    ]
    return rows, claims


def draw_main(results: Results):
    figure, axes = panels([GOLDEN_WIN, "share of samples off support", GOLDEN_WIN, "win rate against pi_ref"], KL, 3.8)
    for (label, arm), color in zip(PRIMARY.items(), (RED, TEAL, GRAY)):
        draw.settled(axes[0], results, arm, WIN, color, label)
        draw.settled(axes[1], results, arm, "off_support", color, label)
    for axis in axes[:2]:
        axis.axvline(KL_FIXED, color="gray", lw=0.8, ls=":")
    for axis, runs, name in ((axes[2], {"8 rounds": (ROUNDS[8], RED), "1 round": (ROUNDS[1], "#d9a521")}, WIN),
                             (axes[3], {"HyPO": (HYPO, COLORS["hypo"]), "DPO": (DPO, COLORS["dpo"])}, "win_rate")):
        for label, (run, color) in runs.items():
            draw.end(axis, results, run, name, color, label)
    for axis, name in ((axes[0], WIN), (axes[2], WIN), (axes[3], "win_rate")):
        draw.frontier(axis, results, name)
    titles = "IPO, 2000 pairs", "the same runs", "6400 pairs, a dot a seed", "400 pairs, a dot a seed"
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------------
# Tang et al.

ONLINE_IPO, OFFLINE_IPO = sweep("ipo", "online", BETAS), sweep("ipo", "offline", BETAS)
SHUFFLED_IPO = sweep("ipo", "replay", BETAS, window=0)
CLOUDS: Arms = {"online": ONLINE_IPO, "offline": OFFLINE_IPO, "shuffled": SHUFFLED_IPO}
LONG = sweep("ipo", betas=(0.03, 0.05, 0.1, 0.15, 0.2), steps=3.0)


def goodhart(results: Results) -> Concluded:
    """Over-optimisation. Is the offline arm only too short? Three times the steps, and online against it at 4 nats.

    Beta 0.15 was added to the long runs after a first look, to enclose the 4 nats more closely. Trained so long with
    beta 0.03, does it get worse while it fits its data better? Online: beta 0.03 against 0.1. Does the proxy like it
    better while the golden reward does not?
    """
    short = [replace(run, steps=1.0) for run in LONG]
    online = [replace(run, source="online") for run in short]
    rows = [row(results, f"{label}, beta {run.beta:g}", run) for label, runs in (
        ("offline", short), ("offline, 300 steps", LONG), ("online", [ONLINE_IPO[0], FINAL])) for run in runs]
    claims = [
        claim("Three times the steps do not help the offline policy.", "win rate at 4 nats, online minus "
              "offline of 300 steps,", results.change_at_kl(online, LONG, KL_FIXED, WIN)),
        claim("Trained longer it gets worse.", "win rate, beta 0.03, 300 steps minus 100,",
              results.change(LONG[0], short[0], WIN), "below"),
        claim("It goes farther from pi_ref.", "log of the ratio of the KLs,", log_kl(results, LONG[0], short[0]),
              margin=0.1, form="+.2f"),
        claim("Meanwhile it fits its data better.", "accuracy on D_golden,",
              results.change(LONG[0], short[0], "data_accuracy")),
        claim("Held back less, the online policy pleases its proxy more (Goodhart's law).",
              "the proxy's reward, beta 0.03 minus 0.1,",
              results.change(ONLINE_IPO[0], FINAL, "sampled_proxy_reward"), margin=0.1, form="+.2f"),
        claim("And the golden reward less.", "golden reward, beta 0.03 minus 0.1,",
              results.change(ONLINE_IPO[0], FINAL, "golden_reward"), "below", 0.1, "+.2f"),
    ]
    return rows, claims


def draw_goodhart(results: Results):
    figure, axes = panels([GOLDEN_WIN, "off support", "mean reward"], KL)
    for label, arm, color in (("online", ONLINE_IPO, RED), ("offline", OFFLINE_IPO, TEAL),
                              ("offline, 300 steps", LONG, "#134e4a")):
        draw.settled(axes[0], results, arm, WIN, color, label)
        draw.settled(axes[1], results, arm, "off_support", color, label)
    draw.frontier(axes[0], results, WIN)
    for name, label, style in (("sampled_proxy_reward", "by the proxy", "--"), ("golden_reward", "golden", "-")):
        draw.settled(axes[2], results, ONLINE_IPO, name, RED, f"online, {label}", dots=False, ls=style)
        draw.settled(axes[2], results, OFFLINE_IPO, name, TEAL, f"offline, {label}", dots=False, ls=style)
    return figure


LABELS: Arms = {"online": sweep("ipo", "online", labels="bradley-terry"),
                "offline": sweep("ipo", labels="bradley-terry")}


def labels(results: Results) -> Concluded:
    """The first two primary claims again, where labels are drawn from Bradley-Terry, as people would disagree."""
    def at_kl(name):
        return results.change_at_kl(LABELS["online"], LABELS["offline"], KL_FIXED, name)

    rows = [row_at_kl(results, f"{label}, Bradley-Terry", arm) for label, arm in LABELS.items()]
    rows += [row_at_kl(results, f"{label}, sign", sweep("ipo", label)) for label in LABELS]
    return rows, [
        claim("With noisy labels, too, online beats offline at equal KL.", "win rate at 4 nats, online minus offline,",
              at_kl(WIN)),
        claim("The offline policy leaves the support.", "off support at 4 nats, online minus offline,",
              at_kl("off_support"), "below", 0.01)]


def draw_clouds(arms: Arms, colors=(RED, TEAL, GRAY)):
    """A drawing function: every checkpoint of some arms, and a line through where their runs end."""
    def draw_arms(results: Results):
        figure, axes = panels([GOLDEN_WIN, "share of samples off support"], KL)
        for (label, arm), color in zip(arms.items(), colors):
            draw.settled(axes[0], results, arm, WIN, color, label)
            draw.settled(axes[1], results, arm, "off_support", color, label)
        draw.frontier(axes[0], results, WIN)
        return figure
    return draw_arms


PROXIES: Arms = {"online, reward model": sweep("ipo", "online"),
                 "online, implicit proxy": sweep("ipo", "online", judge="implicit"), "offline": sweep("ipo")}


def proxy(results: Results) -> Concluded:
    """Another proxy of the same labels: the offline policy's log-ratio labels the online pairs.

    Does online still beat offline at 4 nats? Is the more accurate proxy the better one?
    """
    model, implicit, offline = PROXIES.values()
    accuracy = proxy_accuracy(results, FINAL), results.last(OFFLINE, "accuracy")
    rows = [{**row_at_kl(results, label, arm), "its proxy's accuracy": text} for (label, arm), text in zip(
        PROXIES.items(), (share(accuracy[0]), share(accuracy[1]), ""))]
    return rows, [
        claim("Labelled by the offline policy itself, online still beats offline.", "win rate at 4 nats, minus "
              "offline,", results.change_at_kl(implicit, offline, KL_FIXED, WIN)),
        claim("A more accurate proxy is the better one.", "win rate at 4 nats, implicit minus reward model,",
              results.change_at_kl(implicit, model, KL_FIXED, WIN)),
        claim("", "(its accuracy on held-out pairs, implicit minus reward model,", minus(*accuracy[::-1]))]


REPLAYS = {window: Run("ipo", "replay", window=window) for window in (1, 4, 32, 0)}  # 0: shuffled as a whole


def coverage(results: Results) -> Concluded:
    """The online run's own pairs, beta 0.1, given again: in order, shuffled within windows of steps, as a whole.

    In order they give the online run, to the byte. Windows of 4 steps cost nothing; 32 do.
    """
    runs = {"online": FINAL, "shuffled within 4 steps": REPLAYS[4], "shuffled within 32 steps": REPLAYS[32],
            "shuffled as a whole": REPLAYS[0], "offline pairs": OFFLINE}
    equal = results.beside["equal bytes"]
    rows = [row(results, label, run) for label, run in runs.items()]
    rows[0]["run"] += f"; replayed in order: the same bytes in {sum(equal)} of {len(equal)} seeds"
    return rows, [
        claim("Small windows cost nothing.", "win rate, within 4 steps minus online,",
              results.change(REPLAYS[4], FINAL, WIN), "equal"),
        claim("Large windows do.", "win rate, within 32 steps minus online,",
              results.change(REPLAYS[32], FINAL, WIN), "below"),
        claim("Shuffled online pairs are no better than offline ones.", "win rate at 4 nats, shuffled minus offline,",
              results.change_at_kl(SHUFFLED_IPO, OFFLINE_IPO, KL_FIXED, WIN), "equal"),
        claim("They keep to the support better.", "off support at 4 nats, shuffled minus offline,",
              results.change_at_kl(SHUFFLED_IPO, OFFLINE_IPO, KL_FIXED, "off_support"), "below", 0.01)]


SIDES_OF = {"golden": "pi_ref, pi_ref (D_golden)", "final-final": "final, final", "sft-early": "pi_ref, early",
            "early-final": "early, final"}
QUALITY: Arms = {kind: sweep("ipo", data=kind) for kind in SIDES_OF}


def quality(results: Results) -> Concluded:
    """Offline IPO on pairs whose sides come from pi_ref, from an early and from the final online policy.

    At 4 nats: better responses are not better to learn from; one side near pi_ref is what counts.
    """
    rows = []
    for kind, arm in QUALITY.items():
        pairs = results.beside[f"pairs {kind}"]
        rows.append({**row_at_kl(results, SIDES_OF[kind], arm), "gap in a pair": cell(column(pairs, "gap"), ".2f"),
                     "reward of the pairs": cell(column(pairs, "mean"), ".2f")})

    def lead(kind):
        return results.change_at_kl(QUALITY[kind], QUALITY["golden"], KL_FIXED, WIN)

    return rows, [
        claim("Pairs of far better responses are no better to learn from.", "win rate at 4 nats, final-final minus "
              "D_golden,", lead("final-final"), "equal"),
        claim("One side near pi_ref is what helps.", "pi_ref-early minus D_golden,", lead("sft-early"), "equal"),
        claim("Contrast alone does not help.", "early-final minus D_golden,", lead("early-final"), "equal")]


def correlation(results: Results, arms: list[list[Run]]) -> list[float]:
    """For each seed, over the runs of some arms at the last step: of accuracy on D_golden with the win rate."""
    runs = list(chain(*arms))
    by_seed = zip(*(zip(results.last(run, "data_accuracy"), results.last(run, WIN)) for run in runs))
    return [statistics.correlation(*zip(*of_seed)) for of_seed in by_seed]


def classify(results: Results) -> Concluded:
    """Proxy and policies, beta 0.1, as classifiers; and whether accuracy goes with the win rate.

    The offline policy classifies D_golden better than the online one, and wins less at 4 nats (see main). Accuracy and
    win rate are correlated over all arms at the last step (their Figure 7), and over the runs of one arm.
    """
    stream = results.beside["classify"]
    whole = {key: [statistics.fmean(of_seed[key]) for of_seed in stream] for key in ("proxy", "online", "offline")}
    rows = [{"classifier": label, "online stream": share(whole[key]),
             "... first tenth": share([s[key][0] for s in stream]),
             "... last tenth": share([s[key][-1] for s in stream]),
             "its own samples": share(column(stream, f"{key}_self")) if run else "",
             "D_golden": share(results.last(run, "data_accuracy")) if run else "",
             "held-out pairs": share(results.last(run, "accuracy") if run else proxy_accuracy(results, FINAL))}
            for label, key, run in (("proxy", "proxy", None), ("online policy", "online", FINAL),
                                    ("offline policy", "offline", OFFLINE))]
    arms = list(CLOUDS.values())
    return rows, [
        claim("The offline policy, which is worse, classifies its data better.",
              "accuracy, offline minus online,", results.change(OFFLINE, FINAL, "data_accuracy")),
        claim("Accuracy does not tell which policy is better.", "correlation with the win rate over all arms,",
              correlation(results, arms), "equal", 0.3, "+.2f"),
        claim("", "over the offline arm alone,", correlation(results, arms[1:2]), "equal", 0.3, "+.2f"),
        claim("The proxy classifies the online stream better than the offline policy does.", "difference in accuracy",
              minus(whole["proxy"], whole["offline"])),
        claim("The proxy gets worse as the stream drifts away from its data.", "last tenth minus first tenth",
              [s["proxy"][-1] - s["proxy"][0] for s in stream], "below"),
        claim("The chosen response's log-prob falls in offline training.", "log-ratio, nats,",
              results.last(OFFLINE, "data_chosen_logratio"), "below", 0.1, "+.1f"),
        claim("In online training, too.", "log-ratio, nats,", results.last(FINAL, "data_chosen_logratio"), "below", 0.1,
              "+.1f"),
        claim("A policy cannot classify its own samples.", "online policy's accuracy minus 1/2",
              [value - 0.5 for value in column(stream, "online_self")], "equal")]


def draw_classify(results: Results):
    figure, axes = panels(["accuracy against the golden reward", GOLDEN_WIN, "accuracy on D_golden",
                           "log-ratio of its chosen, nats"], "step", 3.8)
    stream = results.beside["classify"]
    for key, color, label in (("proxy", "black", "proxy"), ("online", RED, "online policy"),
                              ("offline", TEAL, "offline policy")):
        draw.band(axes[0], stream[0]["steps"], column(stream, key), color, label)
    for (label, arm), color in zip(CLOUDS.items(), (RED, TEAL, GRAY)):
        x, y = ([value for run in arm for value in results.last(run, name)] for name in ("data_accuracy", WIN))
        axes[1].scatter(x, y, s=7, color=color, alpha=0.5, lw=0, label=label)
        for axis, name in zip(axes[2:], ("data_accuracy", "data_chosen_logratio")):
            draw.along(axis, results, arm[3], name, color, label if name != "data_accuracy" else "")
    axes[0].set_xlabel("step of the online stream")
    axes[1].set_xlabel("accuracy on D_golden, last step")
    axes[1].legend(frameon=False, fontsize=9, markerscale=2.5, handletextpad=0)
    return figure


WIDE = (0.1, 0.3, 1.0, 3.0)  # betas of DPO, which goes farther than IPO
LOSSES: dict[str, Arms] = {
    "DPO": {"online": sweep("dpo", "online", WIDE), "offline": sweep("dpo", "offline", WIDE),
            "shuffled": sweep("dpo", "replay", WIDE, window=0)},
    "Best-of-2": {source: [Run("bo2", arm, window=window)] for source, arm, window in (
        ("online", "online", 1), ("offline", "offline", 1), ("shuffled", "replay", 0))}}


def loss(results: Results) -> Concluded:
    """Other losses. DPO at 4 nats: online against offline, and against its pairs shuffled.

    Best-of-2 has no contrast and no beta: it is compared at the same settings.
    """
    arms, (best,) = LOSSES["DPO"], zip(*LOSSES["Best-of-2"].values())
    rows = [row_at_kl(results, f"DPO, {label}", arm) for label, arm in arms.items()]
    rows += [row_at_end(results, f"Best-of-2, {label}", run) for label, run in zip(arms, best)]

    def at_kl(other, name):
        return results.change_at_kl(arms["online"], arms[other], KL_FIXED, name)

    return rows, [
        claim("With DPO, too, online beats offline at equal KL.", "win rate at 4 nats, online minus offline,",
              at_kl("offline", WIN)),
        claim("", "off support at 4 nats, online minus offline,", at_kl("offline", "off_support"), "below", 0.01),
        claim("And its own pairs shuffled.", "win rate at 4 nats, online minus shuffled,", at_kl("shuffled", WIN)),
        claim("With Best-of-2, too.", "win rate, online minus offline,", results.change(best[0], best[1], WIN)),
        claim("There shuffled pairs are as good.", "win rate, online minus shuffled,",
              results.change(best[0], best[2], WIN), "equal")]


SCALE: dict[int, Arms] = {width or 64: {source: sweep("ipo", source, width=width) for source in ("online", "offline")}
                          for width in (16, 32, 0, 128)}  # 0: the default, 64
KL_SCALE = 1.5  # nats, which all widths reach


def scale(results: Results) -> Concluded:
    """Four widths of the policy, at 1.5 nats; pairs and proxy are those of the default width.

    Is online ahead at each width? Does the lead change with each doubling?
    """
    rows = [row_at_kl(results, f"width {width}, {label}", arm, KL_SCALE) for width, arms in SCALE.items()
            for label, arm in arms.items()]
    leads = {width: results.change_at_kl(arms["online"], arms["offline"], KL_SCALE, WIN)
             for width, arms in SCALE.items()}
    claims = [claim("Online is ahead at every size." * (width == 16), "win rate at 1.5 nats, online minus offline, "
                    f"width {width},", values) for width, values in leads.items()]
    whole = [of_seed for of_seed in zip(*(zip(
        results.at_kl(arms["online"], KL_SCALE, WIN), results.at_kl(arms["offline"], KL_SCALE, WIN))
        for arms in SCALE.values())) if all(None not in pair for pair in of_seed)]
    slopes = [statistics.linear_regression([math.log2(width) for width in SCALE], [a - b for a, b in of_seed]).slope
              for of_seed in whole]
    return rows, [*claims, claim("Size does not close the gap.", "change of the lead with each doubling of the width,",
                                 slopes, "equal", 0.015)]


def draw_scale(results: Results):
    figure, axes = panels([GOLDEN_WIN, "", "", ""], KL, 3.3)
    for axis in axes[1:]:
        axis.sharey(axes[0])
    for axis, (width, arms) in zip(axes, SCALE.items()):
        for (label, arm), color in zip(arms.items(), (RED, TEAL)):
            draw.settled(axis, results, arm, WIN, color, label)
        axis.set_title(f"width {width}", fontsize=10)
    return figure


def iterate(results: Results) -> Concluded:
    """How fresh must pairs be? One to eight rounds and online, beta 0.1, 6400 pairs labelled by the proxy each.

    The primary claim, eight rounds against one, is in main. Two and four against one; online against eight.
    """
    runs = {**{f"{n} round" + "s" * (n > 1): run for n, run in ROUNDS.items()}, "online": FINAL}
    claims = [claim(paper, f"win rate, {label},", results.change(run, other, WIN), expected)
              for paper, label, run, other, expected in (
                  ("Two rounds are better than one.", "two rounds minus one", ROUNDS[2], ROUNDS[1], "above"),
                  ("Four are.", "four rounds minus one", ROUNDS[4], ROUNDS[1], "above"),
                  ("Eight rounds are as good as online.", "online minus eight", FINAL, ROUNDS[8], "equal"))]
    return [row(results, label, run) for label, run in runs.items()], claims


def draw_iterate(results: Results):
    runs = {f"{n} round" + "s" * (n > 1): run for n, run in ROUNDS.items()}
    return draw.win_and_kl(results, {**runs, "online": FINAL}, ("#d9a521", "#d97706", "#92400e", "#451a03", RED))


def draw_coverage(results: Results):
    runs = {"online = replayed": FINAL, "within 4 steps": REPLAYS[4], "within 32 steps": REPLAYS[32],
            "shuffled": REPLAYS[0], "offline": OFFLINE}
    return draw.win_and_kl(results, runs, (RED, "#ea8a3c", "#7c2d12", GRAY, TEAL))


# the second world, with four times the pairs
FITTING: Arms = {source: sweep("ipo", source, (0.03, *FEW), world="fitting", pairs=4.0)
                 for source in ("online", "offline")}
FITTING_DPO, FITTING_HYPO = (replace(run, world="fitting", pairs=0.8) for run in (DPO, HYPO))
FITTING_OFFLINE = FITTING["offline"][1]
KL_FITTING = 2.0  # nats


def fitting(results: Results) -> Concluded:
    """Is it the additive reward? The second world, where an opinion is worth what fits the one before it.

    Four times the pairs of the first world. Online against offline at 2 nats, HyPO against DPO, and whether the offline
    policy (beta 0.05) still classifies held-out pairs better than the reward model.
    """
    online, offline = FITTING.values()
    rows = [row_at_kl(results, f"{label} IPO", arm, KL_FITTING) for label, arm in FITTING.items()]
    ends = {"HyPO": FITTING_HYPO, "DPO": FITTING_DPO}
    rows += [row_at_end(results, label, run, KL_FITTING) for label, run in ends.items()]
    model = proxy_accuracy(results, FITTING_OFFLINE)
    return rows, [
        claim("Where clauses interact, too, online beats offline at equal KL.", "win rate at 2 nats, online minus "
              "offline,", results.change_at_kl(online, offline, KL_FITTING, WIN)),
        claim("The offline policy leaves the support.", "off support at 2 nats, online minus offline,",
              results.change_at_kl(online, offline, KL_FITTING, "off_support"), "below", 0.01),
        claim("HyPO beats DPO.", "win rate against pi_ref, 1600 pairs,",
              results.change(FITTING_HYPO, FITTING_DPO, "win_rate")),
        claim("The offline policy classifies held-out pairs better than the reward model.", "difference in accuracy",
              minus(results.last(FITTING_OFFLINE, "accuracy"), model))]


# ---------------------------------------------------------------------------------------------------
# Song et al.

LAMS = {0.0: DPO, **{lam: replace(HYPO, lam=lam) for lam in (0.001, 0.004, 0.016)}}
BETA_RUNS = {beta: (replace(HYPO, beta=beta), replace(DPO, beta=beta)) for beta in (0.03, 0.3, 1.0)}
LIKELY = {0.0: replace(DPO, data="likely"), 0.004: replace(HYPO, data="likely")}
LAM_COLORS = {0.0: COLORS["dpo"], 0.001: "#ea8a3c", 0.004: COLORS["hypo"], 0.016: "#6b1d0b"}


def lam_name(lam: float) -> str:
    return f"HyPO, lam {lam}" if lam else "DPO"


def objective(results: Results, run: Run) -> list[float]:
    """J = V - beta KL at the last step."""
    return [line["golden_reward"] - run.beta * line["reverse_kl"] for *_, line in results[run]]


def hypo(results: Results) -> Concluded:
    """HyPO against DPO on 400 pairs, in the form of Song et al.'s Table 1; lam and beta swept.

    HyPO (lam 0.004) keeps a smaller KL, stays on the support, and has a larger J; a larger lam keeps a smaller KL. At
    other betas it wins more, too; and with pairs that miss the tenth of responses that pi_ref is least likely to write.
    Beta 1 was added after a first look: DPO had been better, the larger its beta.
    """
    plain, ours = LIKELY.values()
    rows = [{**row(results, label, run), "J = V - beta KL": cell(objective(results, run), ".2f")} for label, run in (
        *((lam_name(lam), run) for lam, run in LAMS.items()),
        *((f"{name}, beta {beta}", run) for beta, runs in BETA_RUNS.items()
          for name, run in zip(("HyPO", "DPO"), runs)),
        *((f"{lam_name(lam)}, likely pairs", run) for lam, run in LIKELY.items()))]
    steps = [log_kl(results, b, a) for a, b in zip(list(LAMS.values()), list(LAMS.values())[1:])]

    def gains(run, other):
        return minus(objective(results, run), objective(results, other))

    claims = [
        claim("HyPO keeps a smaller reverse KL.", "log of the ratio of the KLs,", log_kl(results, HYPO, DPO), "below",
              0.1, "+.2f"),
        claim("It stays on the support.", "off support,", results.change(HYPO, DPO, "off_support"), "below", 0.01),
        claim("Its objective is larger.", "J,", gains(HYPO, DPO), margin=0.1, form="+.2f"),
        claim("The larger lam, the smaller the KL.", "largest step of log KL from one lam to the next,",
              [max(of_seed) for of_seed in zip(*steps)], "below", 0.1, "+.2f")]
    for beta, (ours_beta, dpo_beta) in BETA_RUNS.items():
        claims.append(claim(f"With beta {beta} HyPO wins more, too.", "win rate against pi_ref,",
                            results.change(ours_beta, dpo_beta, "win_rate")))
    return rows, claims + [
        claim("With pairs that miss what pi_ref rarely says HyPO wins more, too.", "win rate against pi_ref,",
              results.change(ours, plain, "win_rate")),
        claim("It stays on the support.", "off support,", results.change(ours, plain, "off_support"), "below", 0.01),
        claim("Its objective is larger.", "J,", gains(ours, plain), margin=0.1, form="+.2f")]


def draw_hypo(results: Results):
    figure, axes = panels([ROOT_KL, "win rate against pi_ref", "share of samples off support"], "step")
    for lam, run in LAMS.items():
        for axis, name in zip(axes, ("reverse_kl", "win_rate", "off_support")):
            draw.along(axis, results, run, name, LAM_COLORS[lam], lam_name(lam) if axis is axes[2] else "")
    draw.root_scale(axes[0])
    axes[1].set_ylim(top=1)
    return figure


EXTRAPOLATE = {"DPO": DPO, "HyPO": HYPO, "Online IPO": replace(FINAL, pairs=0.2),
               "PPO": Run("ppo", lr=4.0, pairs=0.2)}
LOG_RATIOS = {"unseen best": "best_logratio", "preferred": "data_chosen_logratio", "rejected": "data_rejected_logratio"}


def extrapolate(results: Results) -> Concluded:
    """Does probability go to good responses that the 400 pairs do not hold? Four algorithms.

    The share of responses of golden reward 4 and more grows beyond pi_ref's, though the log-prob of the pairs' chosen
    responses falls. Beside it: the log-prob of one unseen good response a prompt.
    """
    rows, claims = [], []
    for label, run in EXTRAPOLATE.items():
        best, chosen, rejected = (results.last(run, name) for name in LOG_RATIOS.values())
        good = [(lines[-1]["good"], lines[0]["good"]) for lines in results[run]]
        rows.append({**row(results, label, run), "reward of 4 or more": share([last for last, _ in good]),
                     **{f"{name}, nats": cell(values, "+.1f")
                        for name, values in zip(LOG_RATIOS, (best, chosen, rejected))}})
        claims += [claim(f"{label}: good responses become likelier.", "share of reward 4 or more, minus pi_ref's,",
                         [last - first for last, first in good]),
                   claim(f"{label}: the data's chosen ones become less likely.", "log-ratio, nats,", chosen, "below",
                         0.1, "+.1f")]
    return rows, claims


def draw_extrapolate(results: Results):
    labels = ["share of responses of reward 4 or more", "log pi / pi_ref, nats a sequence", "", "", ""]
    figure, axes = panels(labels, "step", 3.6)
    axes[0].set_ylim(0)
    for axis in axes[2:]:
        axis.sharey(axes[1])
    for axis, (label, run) in zip(axes[1:], EXTRAPOLATE.items()):
        draw.along(axes[0], results, run, "good", COLORS[run.label], label)
        for (name, key), color in zip(LOG_RATIOS.items(), ("#15803d", "#1d4ed8", "#b91c1c")):
            draw.along(axis, results, run, key, color, name if label == "PPO" else "")
        draw.zero_line(axis)
        axis.set_title(label, fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------------
# all of them

class Study(NamedTuple):
    """One study."""
    title: str
    runs: list[Run]
    conclude: Callable[[Results], Concluded]  # its docstring declares what is asked
    draw: Callable  # Results -> figure
    caption: str  # what the panels of the picture, its dots and its bands are
    seeds: int = 10


BAND = "Band: Student's 95 % interval of the mean over seeds."
KL_BAND = "KL is drawn as the median with the range of the seeds, for it is skewed, on a square-root scale."
CLOUD = f"""Small dot: a checkpoint of one seed. Line: the mean over seeds, by interpolation between the last steps of
the runs, a run a beta, where all seeds reach the KL. {BAND} Dashed: the best that any policy can do."""

STUDIES = {
    "main": Study("The five primary claims", [*flat(PRIMARY), ROUNDS[1], ROUNDS[8], HYPO, DPO], main, draw_main, f"""
        First and second panel. {CLOUD} Dotted: where arms are compared. Third and fourth: where each seed's run ends,
        and their mean."""),
    "goodhart": Study("Online against offline at every KL, and over-optimisation", [
        *ONLINE_IPO, *OFFLINE_IPO, *LONG], goodhart, draw_goodhart, f"""
        Left and middle. {CLOUD} Right: dashed, the mean reward that the proxy gives to the policy's samples; solid, the
        golden reward of the same."""),
    "hypo": Study("HyPO against DPO", [*LAMS.values(), *chain(*BETA_RUNS.values()), *LIKELY.values()], hypo, draw_hypo,
                  f"""Left: KL along training. {KL_BAND} Middle and right: win rate and share of samples off support of
        the same runs. {BAND}"""),
    "fitting": Study("Is it the additive reward?", [*flat(FITTING), FITTING_DPO, FITTING_HYPO], fitting,
                     draw_clouds(FITTING), CLOUD, 6),
    "coverage": Study("Is it the data that online training sees?", [*flat(CLOUDS), *REPLAYS.values()], coverage,
                      draw_coverage, f"""Left: win rate along training. {BAND} Right: KL of the same runs, with their
        names. {KL_BAND} The run replayed in order is the online run, to the byte, and is not drawn twice."""),
    "iterate": Study("How fresh must the data be?", [*ROUNDS.values(), FINAL], iterate, draw_iterate, f"""
        Left: win rate along training. {BAND} Right: KL of the same runs, with their names. {KL_BAND} The darker the
        brown, the more rounds."""),
    "classify": Study("Is it better classification?", [CLASSIFY, *flat(CLOUDS)], classify, draw_classify, f"""
        From the left: how often a classifier prefers what the golden reward prefers, on ten stretches of the online
        run's own pairs, in the order of training; the policies are those at the end of training. The last steps of all
        runs, a dot a seed and a beta. Accuracy on D_golden, and the log-ratio of its chosen responses, along training
        at beta 0.1, in the same colours. {BAND}"""),
    "extrapolate": Study("Where does the probability go?", list(EXTRAPOLATE.values()), extrapolate, draw_extrapolate,
                         f"""Left: how much of what a policy says is good. Others: how much likelier (above 0) or less
        likely than under pi_ref a response is, a panel an algorithm, all on one scale. {BAND}""", 6),
    "proxy": Study("How much does online training owe to its proxy?", [*flat(PROXIES), OFFLINE], proxy,
                   draw_clouds(PROXIES, (RED, COLORS["online dpo"], TEAL)), CLOUD, 6),
    "labels": Study("Do noisy labels change it?", [*flat(LABELS), *sweep("ipo", "online"), *sweep("ipo")], labels,
                    draw_clouds(LABELS), CLOUD, 6),
    "quality": Study("Is it the quality of the responses?", [*flat(QUALITY), EARLY, FINAL], quality, draw_clouds(
        {SIDES_OF[kind]: arm for kind, arm in QUALITY.items()}, (TEAL, RED, "#d97706", "#7c3aed")), f"""
        An arm is named by where the two sides of its pairs come from. {CLOUD}""", 6),
    "loss": Study("Is it the contrastive loss?", [*flat(LOSSES["DPO"]), *flat(LOSSES["Best-of-2"])], loss,
                  draw_clouds({f"{kind}, {label}": arm for kind, arms in LOSSES.items() for label, arm in arms.items()},
                              (RED, TEAL, GRAY, "#f59e0b", "#0e7490", "black")), f"""
        {CLOUD} Best-of-2 has no beta: a diamond is where its runs end.""", 6),
    "scale": Study("Is it the size?", list(chain(*map(flat, SCALE.values()))), scale, draw_scale, f"""
        A panel a width of the policy. {CLOUD}""", 6),
}

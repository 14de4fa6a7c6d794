"""The studies: which runs each makes, what it concludes from them, and its picture.

A study has two functions. One takes the Results and gives the rows of a table and the claims; the other draws.
Each arm of a comparison gets the same sweep, or the offline arm the wider one. Where the best checkpoint of a sweep is
reported, one half of the held-out prompts picks it and the other half judges it. Arms are compared within a seed,
where they share the pairs, the proxy and the opponent.
"""

import math
import statistics
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

from eval import COLORS, panels
from experiments import draw
from experiments.draw import GOLDEN_WIN, GRAY, KL, RED, ROOT_KL, TEAL
from experiments.setting import CLASSIFY, FINAL, OFFLINE, Run, setting_of
from experiments.stats import WIN, Arms, Results, cell, claim, column, estimate, mean_over_bins, minus, reached

BETAS = (0.03, 0.1, 0.3)
Concluded = tuple[list[dict], list[dict]]  # rows of a table, claims


def sweep(algorithm: str, source: str = "offline", lrs=(1.0,), **others) -> list[Run]:
    """Runs that differ in beta, and in the learning rate if several are given."""
    return [Run(algorithm, source, beta, lr, **others) for lr in lrs for beta in BETAS]


def flat(arms: Arms) -> list[Run]:
    """All runs of some arms."""
    return list(chain.from_iterable(arms.values()))


# ---------------------------------------------------------------------------------------------------
# Tang et al.

ONLINE_IPO, OFFLINE_IPO = sweep("ipo", "online"), sweep("ipo", lrs=(1.0, 0.4))
GOODHART: Arms = {"online": ONLINE_IPO, "offline": OFFLINE_IPO}


def goodhart(results: Results) -> Concluded:
    """Two clouds of checkpoints over KL, their envelopes, and the two rewards along the runs held back least."""
    by_bin = results.at_equal_kl(ONLINE_IPO, OFFLINE_IPO)
    claims = [claim("At equal KL the online policy wins more.", "online minus offline, mean over the bins of KL both "
                    "reach,", mean_over_bins(by_bin))]
    claims += [claim("", f"at a KL of {low:g} to {high:g} nats", values)
               for (low, high), values in reached(by_bin).items()]
    for paper, name in (("The online peak is higher.", WIN), ("Against pi_ref, too.", "win_rate_judges")):
        online, offline = (column(results.peak(arm), name) for arm in GOODHART.values())
        claims.append(claim(paper, "difference of the peaks", minus(online, offline)))
    for label, (strayed, *_) in GOODHART.items():  # beta 0.03
        fall, rise = (minus(results.last(strayed, name), column(results.peak([strayed]), name))
                      for name in (WIN, "sampled_proxy_reward"))
        claims += [
            claim(f"Past its peak the {label} policy gets worse.", "win rate, last step minus peak, beta 0.03,", fall,
                  "below 0"),
            claim("Meanwhile the proxy likes it better (Goodhart's law).", "change of its reward", rise, form="+.2f")]
    return [results.row(label, arm) for label, arm in GOODHART.items()], claims


def draw_goodhart(results: Results):
    figure, axes = panels([GOLDEN_WIN, "win rate, online minus offline", "mean reward of sampled responses"], "step")
    for (label, arm), color in zip(GOODHART.items(), (RED, TEAL)):
        draw.envelope(axes[0], results, arm, color, label, dots=True)
        draw.along(axes[2], results, arm[0], "sampled_proxy_reward", color, f"{label}, proxy", ls="--")
        draw.along(axes[2], results, arm[0], "golden_reward", color, f"{label}, golden")
    draw.bins(axes[1], results.at_equal_kl(ONLINE_IPO, OFFLINE_IPO), "black")
    draw.zero_line(axes[1])
    for axis, title in zip(axes, ("every checkpoint, and the best a bin of KL", "at equal KL", "beta 0.03")):
        axis.set_title(title, fontsize=10)
    return figure


DPO, PPO = sweep("dpo"), sweep("ppo", steps=0.6)
HYPO = [Run("hypo", lam=lam) for lam in (0.001, 0.004, 0.016)]
ALGORITHMS: Arms = {"online IPO": ONLINE_IPO, "offline IPO": OFFLINE_IPO, "offline DPO": DPO, "HyPO": HYPO, "PPO": PPO}


def algorithms(results: Results) -> Concluded:
    """Five algorithms, each with a sweep of three (offline IPO: six)."""
    peaks = results.peaks(ALGORITHMS)
    claims = [claim("On-policy samples help." if label == "HyPO" else "", f"peak, {label} minus offline DPO,",
                    minus(peaks[label], peaks["offline DPO"])) for label in ("HyPO", "online IPO", "PPO")]
    return [results.row(label, arm) for label, arm in ALGORITHMS.items()], claims


def draw_algorithms(results: Results):
    figure, axes = panels([GOLDEN_WIN, ""], KL)
    colors = [COLORS[run.label] for run, *_ in ALGORITHMS.values()]
    for (label, arm), color in zip(ALGORITHMS.items(), colors):
        draw.envelope(axes[0], results, arm, color, label)
    draw.rows(axes[1], results.peaks(ALGORITHMS), colors, f"peak {GOLDEN_WIN}")
    return figure


IMPLICIT = sweep("ipo", "online", judge="implicit")
PROXIES: Arms = {"all pairs, online": ONLINE_IPO, "all pairs, online, implicit proxy": IMPLICIT,
                 "all pairs, offline": OFFLINE_IPO, "few pairs, online": sweep("ipo", "online", pairs=0.2),
                 "few pairs, offline": sweep("ipo", lrs=(1.0, 0.4), pairs=0.2)}


def proxy(results: Results) -> Concluded:
    """Online against offline with three proxies: a reward model of all pairs or of few, and the offline policy."""
    peaks, (learned, implicit, _, few, _) = results.peaks(PROXIES), PROXIES
    accuracy = {label: results.beside[f"{setting_of(arm[0]).name} accuracy"] for label, arm in PROXIES.items()}
    accuracy[implicit] = results.last(OFFLINE, "accuracy")
    rows = [{**results.row(label, arm), "its proxy's accuracy": cell(accuracy[label]) * ("online" in label)}
            for label, arm in PROXIES.items()]
    offline = {label: f"{label[:9]}, offline" for label in (learned, implicit, few)}
    lead = {label: minus(peaks[label], peaks[other]) for label, other in offline.items()}
    claims = [claim("The online peak is higher." * (label == learned), f"{label}: peak minus offline peak,", values)
              for label, values in lead.items()]
    claims += [claim("At equal KL the online policy wins more." * (label == learned),
                     f"{label}: minus offline, mean over the bins of KL both reach,",
                     mean_over_bins(results.at_equal_kl(PROXIES[label], PROXIES[other])))
               for label, other in offline.items()]
    claims += [claim("A more accurate proxy widens the advantage (expected, not tested).",
                     "peak, with the implicit proxy minus with the reward model,",
                     minus(peaks[implicit], peaks[learned])),
               claim("", "and its accuracy on held-out pairs, implicit minus reward model,",
                     minus(accuracy[implicit], accuracy[learned])),
               claim("", "and the advantage with all pairs minus that with few", minus(lead[learned], lead[few]))]
    return rows, claims


def draw_proxy(results: Results):
    figure, axes = panels([GOLDEN_WIN, GOLDEN_WIN], KL)
    for (label, arm), color in zip(PROXIES.items(), (RED, COLORS["online dpo"], TEAL, RED, TEAL)):
        pairs, _, name = label.partition(", ")
        axis = axes[int(pairs == "few pairs")]
        axis.set_title(f"IPO, {pairs}", fontsize=10)
        draw.envelope(axis, results, arm, color, name, dots=True)
        axis.set_ylim(0, 0.75)
    return figure


REPLAYS = {window: Run("ipo", "replay", window=window) for window in (1, 4, 32, 0)}  # 0: shuffled as a whole
REPLAYED: Arms = {"online": [FINAL], "replayed in order": [REPLAYS[1]], "shuffled within 4 steps": [REPLAYS[4]],
                  "shuffled within 32 steps": [REPLAYS[32]], "shuffled as a whole": [REPLAYS[0]],
                  "offline pairs": [OFFLINE]}


def coverage(results: Results) -> Concluded:
    """The online run's own pairs, given again in order and shuffled; and offline pairs at the same settings."""
    peaks, equal = results.peaks(REPLAYED), results.beside["equal bytes"]
    claims = [
        {"paper": "Replayed in order, the stream gives the online run again.", "values": equal,
         "here": f"the same bytes of the final weights in {sum(equal)} of {len(equal)} seeds",
         "verdict": "holds" if all(equal) else "does not hold"},
        claim("Shuffled as a whole, the same pairs are no longer as good: freshness counts, not the data's range.",
              "peak, online minus shuffled,", minus(peaks["online"], peaks["shuffled as a whole"])),
        claim("The same at the last step.", "online minus shuffled,", results.change(FINAL, REPLAYS[0], WIN)),
        claim("Small windows cost nothing.", "peak, online minus within 4 steps,",
              minus(peaks["online"], peaks["shuffled within 4 steps"]), "not above 0"),
        claim("Shuffled online pairs are hardly better than offline pairs.", "peak, shuffled minus offline at the same "
              "beta and learning rate,", minus(peaks["shuffled as a whole"], peaks["offline pairs"]), "not above 0"),
    ]
    return [results.row(label, arm) for label, arm in REPLAYED.items()], claims


def draw_coverage(results: Results):
    runs = {"online = replayed" if label == "online" else label: run for label, (run,) in REPLAYED.items()
            if label != "replayed in order"}
    return draw.win_and_kl(results, runs, (RED, "#ea8a3c", "#7c2d12", GRAY, TEAL))


SIDES_OF = {"golden": "pi_ref, pi_ref (D_golden)", "final-final": "final, final", "sft-early": "pi_ref, early",
            "early-final": "early, final"}
QUALITY: Arms = {kind: sweep("ipo", data=kind) for kind in SIDES_OF}


def quality(results: Results) -> Concluded:
    """Offline IPO on pairs whose sides come from pi_ref, the early and the final online policy."""
    peaks, rows = results.peaks(QUALITY), []
    for kind, arm in QUALITY.items():
        pairs = results.beside[f"pairs {kind}"]
        rows.append({**results.row(SIDES_OF[kind], arm), "reward of the pairs": cell(column(pairs, "mean"), ".2f"),
                     "gap in a pair": cell(column(pairs, "gap"), ".2f")})
    golden = peaks["golden"]
    claims = [
        claim("Pairs from the final online policy, far better responses, are no better to learn from.",
              "peak, final-final minus D_golden,", minus(peaks["final-final"], golden), "not above 0"),
        claim("One side near pi_ref is what helps: pi_ref against early is as good as D_golden.",
              "peak, D_golden minus pi_ref-early,", minus(golden, peaks["sft-early"]), "not above 0"),
        claim("Contrast alone does not help.", "peak, early-final minus D_golden,",
              minus(peaks["early-final"], golden), "not above 0"),
        claim("Pairs near pi_ref beat pairs far from it.", "peak, pi_ref-early minus final-final,",
              minus(peaks["sft-early"], peaks["final-final"])),
    ]
    return rows, claims


def draw_quality(results: Results):
    figure, axes = panels(["", ""], "")
    peaks = results.peaks({SIDES_OF[kind]: arm for kind, arm in QUALITY.items()})
    rewards = {kind: column(results.beside[f"pairs {kind}"], "mean") for kind in QUALITY}
    draw.rows(axes[0], peaks, [TEAL] * len(peaks), f"peak {GOLDEN_WIN}")
    draw.rows(axes[1], rewards, [GRAY] * len(rewards), "mean golden reward of the pairs")
    axes[1].tick_params(labelleft=False)
    return figure


def classify(results: Results) -> Concluded:
    """Proxy and policies as classifiers; whether that goes with the win rate; where the chosen log-probs go."""
    stream = results.beside["classify"]
    whole = {key: [statistics.fmean(of_seed[key]) for of_seed in stream] for key in ("proxy", "online", "offline")}
    correlation = [statistics.correlation(column(lines, "data_accuracy"), column(lines, WIN))
                   for lines in results.checkpoints(OFFLINE_IPO)]
    rows = [{"classifier": label, "online stream": cell(whole[key]),
             "... first tenth": cell([s[key][0] for s in stream]), "... last tenth": cell([s[key][-1] for s in stream]),
             "its own samples": cell(column(stream, f"{key}_self")) if run else "",
             "D_golden": cell(results.last(run, "data_accuracy")) if run else "",
             "held-out pairs": cell(results.last(run, "accuracy") if run else results.beside["setting accuracy"])}
            for label, key, run in (("proxy", "proxy", None), ("online policy", "online", FINAL),
                                    ("offline policy", "offline", OFFLINE))]
    claims = [
        claim("The proxy classifies the online stream better than the online policy does.", "difference in accuracy",
              minus(whole["proxy"], whole["online"])),
        claim("And better than the offline policy does.", "difference in accuracy",
              minus(whole["proxy"], whole["offline"])),
        claim("The proxy gets worse as the stream drifts away from its data.", "last tenth minus first tenth",
              [s["proxy"][-1] - s["proxy"][0] for s in stream], "below 0"),
        claim("The offline policy is the better classifier of D_golden.", "offline minus online policy, last step,",
              results.change(OFFLINE, FINAL, "data_accuracy")),
        claim("And yet the worse policy.", "win rate, offline minus online,", results.change(OFFLINE, FINAL, WIN),
              "below 0"),
        claim("Accuracy does not predict the win rate.", "correlation over the offline arm's checkpoints",
              correlation, "not above 0", "+.2f"),
        claim("The chosen response's log-prob falls in offline training.", "log-ratio at the last step, nats,",
              results.last(OFFLINE, "data_chosen_logratio"), "below 0", "+.1f"),
        claim("In online training, too.", "log-ratio at the last step, nats,",
              results.last(FINAL, "data_chosen_logratio"), "below 0", "+.1f"),
        claim("A policy cannot classify its own samples.", "online policy's accuracy minus 1/2",
              [value - 0.5 for value in column(stream, "online_self")], "not above 0"),
    ]
    return rows, claims


def draw_classify(results: Results):
    figure, axes = panels(["accuracy against the golden reward", GOLDEN_WIN, "log-ratio of D_golden's chosen, nats"],
                          "step")
    stream = results.beside["classify"]
    for key, color, label in (("proxy", "black", "proxy"), ("online", RED, "online policy"),
                              ("offline", TEAL, "offline policy")):
        draw.band(axes[0], stream[0]["steps"], column(stream, key), color, label)
    for label, arm, run, color in (("online", ONLINE_IPO, FINAL, RED), ("offline", OFFLINE_IPO, OFFLINE, TEAL),
                                   ("shuffled", [REPLAYS[0]], REPLAYS[0], GRAY)):
        points = list(chain(*results.checkpoints(arm)))
        axes[1].scatter(column(points, "data_accuracy"), column(points, WIN), s=7, color=color, alpha=0.5, lw=0,
                        label=label)
        draw.along(axes[2], results, run, "data_chosen_logratio", color, label)
    axes[0].set_xlabel("step of the online stream")
    axes[1].set_xlabel("accuracy on D_golden")
    axes[1].legend(frameon=False, fontsize=9, markerscale=2.5, handletextpad=0)
    return figure


BO2 = {source: [Run("bo2", source, lr=lr, window=window) for lr in (1.0, 0.4)]
       for source, window in (("online", 1), ("replay", 0), ("offline", 1))}
LOSSES: dict[str, Arms] = {
    "IPO": {"online": ONLINE_IPO, "shuffled": [REPLAYS[0]], "offline": sweep("ipo")},
    "DPO": {"online": sweep("dpo", "online"), "shuffled": [Run("dpo", "replay", window=0)], "offline": DPO},
    "Best-of-2": {"online": BO2["online"], "shuffled": BO2["replay"], "offline": BO2["offline"]}}
LOSS: Arms = {f"{kind}, {source}": arm for kind, arms in LOSSES.items() for source, arm in arms.items()}


def loss(results: Results) -> Concluded:
    """Online, shuffled and offline with three losses."""
    rows = [results.row(label + " (beta 0.1 only)" * (len(arm) == 1), arm) for label, arm in LOSS.items()]
    peaks = results.peaks(LOSS)
    claims = [claim(f"{kind}: online beats offline.", "difference of the peaks",
                    minus(peaks[f"{kind}, online"], peaks[f"{kind}, offline"])) for kind in LOSSES]
    claims.append(claim("Best-of-2 on the shuffled stream is as good as online.", "peak, online minus shuffled,",
                        minus(peaks["Best-of-2, online"], peaks["Best-of-2, shuffled"]), "not above 0"))
    return rows, claims


def draw_loss(results: Results):
    figure, axes = panels([""], "", 7)
    draw.rows(axes[0], results.peaks(LOSS), [RED, GRAY, TEAL] * 3, f"peak {GOLDEN_WIN}")
    return figure


SCALE: dict[int, Arms] = {width or 64: {source: [Run("ipo", source, width=width)] for source in ("online", "offline")}
                          for width in (16, 32, 0, 128)}  # 0: the default, 64


def gaps_by_width(results: Results) -> dict[int, list[float]]:
    """Width -> for each seed the online peak minus the offline peak."""
    return {width: minus(*results.peaks(arms).values()) for width, arms in SCALE.items()}


def scale(results: Results) -> Concluded:
    """Online and offline at four widths of the policy; pairs and proxy are those of the default width."""
    rows = [results.row(f"width {width}, {source}", arm) for width, arms in SCALE.items()
            for source, arm in arms.items()]
    gaps = gaps_by_width(results)
    claims = [claim("The gap is there at every size." * (width == 16), f"width {width}: peak, online minus offline,",
                    values) for width, values in gaps.items()]
    slopes = [statistics.linear_regression([math.log2(width) for width in gaps], by_width).slope
              for by_width in zip(*gaps.values())]
    claims.append(claim("It narrows slowly with size.", "change of the gap with each doubling of the width", slopes,
                        "below 0"))
    return rows, claims


def draw_scale(results: Results):
    figure, axes = panels([f"peak {GOLDEN_WIN}", "online minus offline"], "width of the policy")
    for arm, color in (("online", RED), ("offline", TEAL)):
        by_width = [results.peaks(arms)[arm] for arms in SCALE.values()]
        draw.band(axes[0], SCALE, zip(*by_width), color, arm, marker="o", ms=4)
    draw.band(axes[1], SCALE, zip(*gaps_by_width(results).values()), "black", marker="o", ms=4)
    draw.zero_line(axes[1])
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(SCALE), list(SCALE))
    return figure


ROUNDS: Arms = {**{f"{n} round" + "s" * (n > 1): [Run("ipo", "iterative", rounds=n)] for n in (1, 2, 4, 8)},
                "online": [FINAL], "offline, golden labels": [OFFLINE]}


def iterate(results: Results) -> Concluded:
    """One run for each number of rounds, all labelled by the proxy; and offline pairs with golden labels."""
    peaks = results.peaks(ROUNDS)
    papers = {"online": "Fresh data help.", "2 rounds": "Online or iterative, on-policy data in some form do."}
    claims = [claim(papers.get(label, ""), f"peak, {label} minus one round,", minus(peaks[label], peaks["1 round"]))
              for label in ("online", "2 rounds", "4 rounds", "8 rounds")]
    claims.append(claim("", "last step, online minus 8 rounds,",
                        results.change(FINAL, ROUNDS["8 rounds"][0], WIN)))
    return [results.row(label, arm) for label, arm in ROUNDS.items()], claims


def draw_iterate(results: Results):
    return draw.win_and_kl(results, {label: run for label, (run,) in ROUNDS.items()},
                           ("#d9a521", "#d97706", "#92400e", "#451a03", RED, TEAL))


# ---------------------------------------------------------------------------------------------------
# Song et al.

FULL_COVER = {0.0: Run("dpo"), **{run.lam: run for run in HYPO}}
PARTIAL = {lam: Run("hypo" if lam else "dpo", data="covered", lam=lam) for lam in (0.0, 0.004, 0.016)}
LAM_COLORS = {0.0: COLORS["dpo"], 0.001: "#ea8a3c", 0.004: COLORS["hypo"], 0.016: "#6b1d0b"}


def lam_name(lam: float) -> str:
    return f"HyPO, lam {lam}" if lam else "DPO"


def objective(results: Results, run: Run) -> list[float]:
    """J = V - beta KL at the last step."""
    return [line["golden_reward"] - run.beta * line["reverse_kl"] for *_, line in results[run]]


def hypo(results: Results) -> Concluded:
    """HyPO's lam from 0, which is DPO, at the last step: no checkpoint is picked. Full and partial coverage."""
    rows, log_kl = [], {}
    for run in [*FULL_COVER.values(), *PARTIAL.values()]:
        log_kl[run] = [math.log(kl) for kl in results.last(run, "reverse_kl")]
        rows.append({"run": "partial coverage: " * (run.data == "covered") + lam_name(run.lam),
                     "win rate against pi_ref": cell(results.last(run, "win_rate")),
                     "golden reward V": cell(results.last(run, "golden_reward"), ".2f"),
                     "KL": cell(results.last(run, "reverse_kl"), ".1f"),
                     "J = V - beta KL": cell(objective(results, run), ".2f"),
                     "uncovered": cell(results.last(run, "uncovered"), ".2f")})
    (dpo, ours), (dpo_partial, ours_partial) = ((runs[0.0], runs[0.004]) for runs in (FULL_COVER, PARTIAL))
    steps = [minus(log_kl[b], log_kl[a]) for a, b in zip(FULL_COVER.values(), HYPO)]
    claims = [
        claim("HyPO wins more than DPO.", "win rate against pi_ref, lam 0.004 minus DPO,",
              results.change(ours, dpo, "win_rate")),
        claim("It keeps a smaller reverse KL.", "log of the ratio of the KLs", minus(log_kl[ours], log_kl[dpo]),
              "below 0", "+.2f"),
        claim("The objective is larger.", "J, lam 0.004 minus DPO,",
              minus(objective(results, ours), objective(results, dpo)), form="+.2f"),
        claim("The larger lam, the smaller the KL.", "largest step of log KL from one lam to the next",
              [max(of_seed) for of_seed in zip(*steps)], "below 0", "+.2f"),
        claim("With data that miss a part the KL is smaller, too.", "log of the ratio of the KLs, lam 0.004 to DPO,",
              minus(log_kl[ours_partial], log_kl[dpo_partial]), "below 0", "+.2f"),
        claim("And the objective larger.", "J, lam 0.004 minus DPO,",
              minus(objective(results, ours_partial), objective(results, dpo_partial)), form="+.2f"),
        claim("And less is said that the data never show.", "share of such responses, lam 0.004 minus DPO,",
              results.change(ours_partial, dpo_partial, "uncovered"), "below 0"),
    ]
    return rows, claims


def draw_hypo(results: Results):
    figure, axes = panels([ROOT_KL, "win rate against pi_ref", "J = V - beta KL"], "step")
    for lam, run in FULL_COVER.items():
        for axis, name in zip(axes, ("reverse_kl", "win_rate")):
            draw.along(axis, results, run, name, LAM_COLORS[lam], lam_name(lam))
    draw.root_scale(axes[0])
    axes[1].set_ylim(top=1)
    for runs, label, marker, dashes in ((FULL_COVER, "full coverage", "o", "-"), (PARTIAL, "partial", "s", "--")):
        kl = [statistics.fmean(results.last(run, "reverse_kl")) for run in runs.values()]
        means = [estimate(objective(results, run)) for run in runs.values()]
        axes[2].plot(kl, [mean for mean, _, _ in means], color=GRAY, lw=0.8, ls=dashes)
        for lam, x, (mean, half, _) in zip(runs, kl, means):
            draw.whiskers(axes[2], x, mean, LAM_COLORS[lam], yerr=half, marker=marker)
        draw.label_at(axes[2], kl[0], means[0][0], label, GRAY)
    axes[2].set_xlabel("KL at the last step, nats a sequence")
    return figure


EXTRAPOLATE = {"DPO": Run("dpo"), "HyPO": Run("hypo", lam=0.004), "Online IPO": FINAL, "PPO": Run("ppo", steps=0.6)}
LOG_RATIOS = {"unseen best": "best_logratio", "preferred": "data_chosen_logratio", "rejected": "data_rejected_logratio"}


def extrapolate(results: Results) -> Concluded:
    """Log-ratios of responses in and out of the data, along training."""
    rows, claims = [], []
    for label, run in EXTRAPOLATE.items():
        best, chosen, rejected = (results.last(run, name) for name in LOG_RATIOS.values())
        early = [lines[len(lines) // 4]["best_logratio"] for lines in results[run]]
        rows.append({"run": label, **{f"{name}, nats": cell(values, "+.1f")
                                      for name, values in zip(LOG_RATIOS, (best, chosen, rejected))}})
        claims += [claim(f"{label}: the best unseen response becomes likelier.", "log-ratio at a quarter of training, "
                         "nats,", early, form="+.1f"),
                   claim(f"{label}: to the end.", "the same at the last step", best, form="+.1f"),
                   claim("... while the preferred ones of the data become less likely.", "log-ratio at the last step,",
                         chosen, "below 0", "+.1f"),
                   claim("", "unseen best minus preferred,", minus(best, chosen), form="+.1f")]
    return rows, claims


def draw_extrapolate(results: Results):
    figure, axes = panels(["log pi / pi_ref, nats a sequence", "", "", ""], "step", 3.3)
    for axis, (label, run) in zip(axes, EXTRAPOLATE.items()):
        for (name, key), color in zip(LOG_RATIOS.items(), ("#15803d", "#1d4ed8", "#b91c1c")):
            draw.along(axis, results, run, key, color, name if label == "PPO" else "")
        draw.zero_line(axis)
        axis.set_title(label, fontsize=10)
        axis.sharey(axes[0])
        axis.tick_params(labelleft=axis is axes[0])
    return figure


# ---------------------------------------------------------------------------------------------------
# all of them

class Study(NamedTuple):
    """One study."""
    title: str
    runs: list[Run]
    conclude: Callable[[Results], Concluded]
    draw: Callable  # Results -> figure
    caption: str  # what the panels of the picture, its dots and its bands are


BAND = "Band: Student's 95 % interval of the mean over seeds."
KL_BAND = "KL is drawn as the median with the range of the seeds, for it is skewed, on a square-root scale."
ENVELOPE = """Line: the win rate of the best checkpoint in each bin of KL (0.25 to 0.5 nats, and on by doubling),
averaged over seeds; bins that fewer than four of five seeds reach are left out."""
PEAKS = "Small dot: the best checkpoint of one seed. Large dot with whiskers: their mean with Student's 95 % interval."

STUDIES = {
    "goodhart": Study("Online against offline at equal KL", flat(GOODHART), goodhart, draw_goodhart, f"""
        Left: every checkpoint of every seed is a dot. {ENVELOPE} Middle: the online line less the offline line,
        seed by seed; above 0, online wins more. Right: the runs with beta 0.03 along training; a dashed line is
        the reward that the proxy gives, a solid one the golden reward. {BAND}"""),
    "algorithms": Study("Five algorithms, the same pairs", flat(ALGORITHMS), algorithms, draw_algorithms, f"""
        Left. {ENVELOPE} {BAND} Right. {PEAKS}"""),
    "coverage": Study("Is it the data that online training sees?", flat(REPLAYED), coverage, draw_coverage, f"""
        Left: win rate along training. {BAND} Right: KL of the same runs, with their names. {KL_BAND} The run
        replayed in order is the online run, to the byte, and is not drawn twice."""),
    "proxy": Study("How much does online training owe to its proxy?", flat(PROXIES), proxy, draw_proxy, f"""
        Left: with all pairs; right: with a fifth of them. Every checkpoint of every seed is a dot. {ENVELOPE}
        {BAND}"""),
    "quality": Study("Is it the quality of the responses?", flat(QUALITY), quality, draw_quality, f"""
        A row is where the two sides of the offline pairs come from. Left: the peak of training on them. {PEAKS}
        Right: the mean golden reward of the pairs' responses, drawn in the same way."""),
    "classify": Study("Is it better classification?", [CLASSIFY, *flat(GOODHART), REPLAYS[0]], classify,
                      draw_classify, f"""
        Left: how often a classifier prefers what the golden reward prefers, on ten stretches of the online run's
        own pairs, in the order of training; the policies are those at the end of training. Middle: every
        checkpoint of every seed is a dot. Right: the log-ratio of the chosen responses of D_golden along
        training. {BAND}"""),
    "loss": Study("Is it the contrastive loss?", flat(LOSS), loss, draw_loss, f"""
        A row is a loss and where its pairs come from. {PEAKS}"""),
    "scale": Study("Is it the size?", list(chain(*map(flat, SCALE.values()))), scale, draw_scale, f"""
        Dot: the peak at one width, averaged over seeds. Left: both arms. Right: online less offline, seed by
        seed. {BAND}"""),
    "iterate": Study("How fresh must the data be?", flat(ROUNDS), iterate, draw_iterate, f"""
        Left: win rate along training. {BAND} Right: KL of the same runs, with their names. {KL_BAND} The darker
        the brown, the more rounds."""),
    "hypo": Study("HyPO against DPO", [*FULL_COVER.values(), *PARTIAL.values()], hypo, draw_hypo, f"""
        Left: KL along training. {KL_BAND} Middle: win rate of the same runs. {BAND} Right: the last step, in the
        colours of the other panels; a circle is trained on pairs that cover all of pi_ref, a square on pairs
        that never say the worst words; a whisker is Student's 95 % interval; a line joins one kind of data, from
        DPO, at its label, to the largest lam."""),
    "extrapolate": Study("Where does the probability go?", list(EXTRAPOLATE.values()), extrapolate,
                         draw_extrapolate, f"""
        A panel an algorithm, all on one scale. Line: how much likelier (above 0) or less likely than under
        pi_ref a response is, along training; PPO has three fifths of the steps. {BAND}"""),
}

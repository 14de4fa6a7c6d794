"""Every experiment of the two papers, one command each.

    python study.py goodhart                 # do the runs that are missing, then table, verdicts and picture
    python study.py all                      # every study, and the README's section of results
    python study.py all --quick              # two seeds, few and short runs: to see that everything works

Tang et al. 2024 (arXiv 2405.08448) ask why online preference fine-tuning beats offline, when both know the
same labels; the setting is in experiments.py.

    goodhart      online against offline IPO at equal KL, and what over-optimisation is (their Figure 1)
    algorithms    IPO, DPO, HyPO and PPO on the same pairs and the same proxy
    proxy         the same with another proxy, the offline policy itself, and with one from a fifth of the pairs
    coverage      is it the data? the online run's own pairs, replayed in order and shuffled (Figures 4, 13)
    quality       is it better responses? offline pairs from better policies (Figures 5, 12)
    classify      is it better classification? proxy and policies as classifiers (Figures 6, 7, 8)
    loss          is it the contrastive loss? IPO, DPO, Best-of-2 (Figure 9)
    scale         is it the size? policies of four widths with the same proxy (Figures 10, 11)
    iterate       how fresh must the data be? two to eight rounds between offline and online

Song et al. 2024 (arXiv 2406.01462) add to offline data the KL on online samples.

    hypo          HyPO against DPO: reverse KL along training, lam, data that miss a part (Figure 1, Table 1)
    extrapolate   log-probs of preferred, rejected and unseen good responses along training (Figure 2)

The budget is KL(pi || pi_ref). Each arm of a comparison gets the same sweep, or the offline arm the wider one.
Where the best checkpoint of a sweep is reported, one half of the held-out prompts picks it and the other half
judges it. Intervals are 95 % by Student over seeds; arms are compared within a seed, where they share the
pairs, the proxy and the opponent. Finished runs are in runs/study and are not done again.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path

import torch

import data
import run
from eval import COLORS, estimate, read_metrics
from experiments import CLASSIFY, FINAL, OFFLINE, Run, run_jobs, setting_of
from report import (
    WIN,
    along,
    as_text,
    at_equal_kl,
    band,
    cell,
    claim,
    draw_bins,
    draw_dots,
    draw_envelope,
    label_end,
    last,
    mean_over_bins,
    minus,
    peak,
    peak_row,
    reached,
    sentence,
    spread_labels,
    style,
    write_readmes,
)

FULL = dict(seeds=5, steps=200, batch_size=64, eval_every=25, eval_samples=512, pairs=2000)
QUICK = dict(seeds=2, steps=48, batch_size=32, eval_every=16, eval_samples=128, pairs=200)

# ---------------------------------------------------------------------------------------------------
# the runs of the studies

BETAS = (0.03, 0.1, 0.3)


def sweep(*args, lrs=(1.0,), **kwargs) -> list[Run]:
    return [Run(*args, beta=beta, lr=lr, **kwargs) for lr in lrs for beta in BETAS]


ONLINE_IPO, OFFLINE_IPO = sweep("ipo", "online"), sweep("ipo", lrs=(1.0, 0.4))
DPO, PPO = sweep("dpo"), sweep("ppo", steps=0.6)
HYPO = [Run("hypo", lam=lam) for lam in (0.001, 0.004, 0.016)]
REPLAYS = {window: Run("ipo", "replay", window=window) for window in (1, 4, 32, 0)}  # 0: shuffled as a whole
IMPLICIT = sweep("ipo", "online", judge="implicit")
FEW = {"online": sweep("ipo", "online", pairs=0.2), "offline": sweep("ipo", lrs=(1.0, 0.4), pairs=0.2)}
QUALITY = {kind: sweep("ipo", data=kind) for kind in ("golden", "final-final", "sft-early", "early-final")}
BO2 = {source: [Run("bo2", source, lr=lr, window=window) for lr in (1.0, 0.4)]
       for source, window in (("online", 1), ("replay", 0), ("offline", 1))}
LOSSES = {
    "ipo": {"online": ONLINE_IPO, "shuffled": [REPLAYS[0]], "offline": sweep("ipo")},
    "dpo": {"online": sweep("dpo", "online"), "shuffled": [Run("dpo", "replay", window=0)], "offline": DPO},
    "bo2": {"online": BO2["online"], "shuffled": BO2["replay"], "offline": BO2["offline"]},
}
SCALE = {width: {source: [Run("ipo", source, width=width)] for source in ("online", "offline")}
         for width in (16, 32, 0, 128)}  # 0: the default, 64
PARTIAL = {lam: Run("hypo" if lam else "dpo", data="covered", lam=lam) for lam in (0.0, 0.004, 0.016)}
FULL_COVER = {0.0: Run("dpo"), **{run_.lam: run_ for run_ in HYPO}}
ROUNDS = {rounds: Run("ipo", "iterative", rounds=rounds) for rounds in (1, 2, 4, 8)}


# ---------------------------------------------------------------------------------------------------
# the studies: results in; rows of a table and claims out, and a picture drawn

RED, TEAL, GRAY = COLORS["online ipo"], COLORS["ipo"], "#6b7280"


def goodhart(results, figure):
    """Two clouds of checkpoints over KL, their envelopes, and the two rewards along the runs held back least."""
    online, offline = peak(results, ONLINE_IPO), peak(results, OFFLINE_IPO)
    by_bin = at_equal_kl(results, ONLINE_IPO, OFFLINE_IPO)
    strayed = {"online": ONLINE_IPO[0], "offline": OFFLINE_IPO[0]}  # beta 0.03, the least held back
    claims = [
        claim("At equal KL the online policy wins more.", "online minus offline, mean over the bins of KL both reach,",
              mean_over_bins(by_bin)),
        *(claim("", f"at a KL of {low:g} to {high:g} nats", values) for (low, high), values in reached(by_bin).items()),
        claim("The online peak is higher.", "difference of the peaks", minus(online, offline, WIN)),
        claim("Against pi_ref, too.", "difference of the peaks", minus(online, offline, "win_rate_judges")),
    ]
    for arm, run_ in strayed.items():
        best = peak(results, [run_])
        fall, rise = ([line["last"][name] - line[name] for line in best] for name in (WIN, "sampled_proxy_reward"))
        claims += [
            claim(f"Past its peak the {arm} policy gets worse.", "win rate, last step minus peak, beta 0.03,", fall,
                  "below 0"),
            claim("Meanwhile the proxy likes it better (Goodhart's law).", "change of its reward", rise, form="+.2f")]
    axes = style(figure, 3)
    draw_envelope(axes[0], results, ONLINE_IPO, RED, "online", dots=True)
    draw_envelope(axes[0], results, OFFLINE_IPO, TEAL, "offline", dots=True)
    axes[0].set_title("every checkpoint, and the best a bin of KL", fontsize=10)
    draw_bins(axes[1], by_bin, "black")
    axes[1].axhline(0, color="gray", lw=0.8, ls=":")
    axes[1].set_ylabel("win rate, online minus offline")
    axes[1].set_title("at equal KL", fontsize=10)
    for arm, run_ in strayed.items():
        color = COLORS[run_.label]
        along(axes[2], results, run_, "sampled_proxy_reward", color, f"{arm}, proxy", ls="--")
        along(axes[2], results, run_, "golden_reward", color, f"{arm}, golden")
    axes[2].set_ylabel("mean reward of sampled responses")
    axes[2].set_title("beta 0.03", fontsize=10)
    return [peak_row("online", results, ONLINE_IPO), peak_row("offline", results, OFFLINE_IPO)], claims


def algorithms(results, figure):
    """Five algorithms, each with a sweep of three (offline IPO: six)."""
    arms = {"online IPO": ONLINE_IPO, "offline IPO": OFFLINE_IPO, "offline DPO": DPO, "HyPO": HYPO, "PPO": PPO}
    peaks = {label: peak(results, arm) for label, arm in arms.items()}
    claims = [claim("On-policy samples help.", "peak, HyPO minus offline DPO,",
                    minus(peaks["HyPO"], peaks["offline DPO"], WIN))]
    claims += [claim("", f"peak, {label} minus offline DPO,", minus(peaks[label], peaks["offline DPO"], WIN))
               for label in ("online IPO", "PPO")]
    axes = style(figure, 2)
    for label, arm in arms.items():
        draw_envelope(axes[0], results, arm, COLORS[arm[0].label], label)
    draw_dots(axes[1], [(label, [line[WIN] for line in peaks[label]], COLORS[arm[0].label])
                        for label, arm in arms.items()], "peak win rate against the golden baseline")
    return [peak_row(label, results, arm) for label, arm in arms.items()], claims


def proxy(results, figure):
    """Online against offline with three proxies: a reward model of all pairs or of few, and the offline policy."""
    many, few = (f"{results['pairs'] * share:g} pairs" for share in (1.0, 0.2))
    arms = {f"{many}, online": ONLINE_IPO, f"{many}, online, implicit proxy": IMPLICIT, f"{many}, offline": OFFLINE_IPO,
            f"{few}, online": FEW["online"], f"{few}, offline": FEW["offline"]}
    peaks = {label: peak(results, arm) for label, arm in arms.items()}
    by_proxy = {label: results[f"{setting_of(arm[0]).name} accuracy"] for label, arm in arms.items()}
    by_proxy[f"{many}, online, implicit proxy"] = [line["accuracy"] for line in last(results, OFFLINE)]
    rows = [{**peak_row(label, results, arm), "its proxy's accuracy": cell(by_proxy[label]) * ("online" in label)}
            for label, arm in arms.items()]
    over_offline = {label: minus(peaks[label], peaks[f"{label.partition(',')[0]}, offline"], WIN)
                    for label in arms if "online" in label}
    claims = [claim("The online peak is higher." if i == 0 else "", f"{label}: peak minus offline peak,", values)
              for i, (label, values) in enumerate(over_offline.items())]
    implicit, learned = (f"{many}, online, implicit proxy", f"{many}, online")
    claims += [claim("At equal KL the online policy wins more." if i == 0 else "",
                     f"{label}: minus offline, mean over the bins of KL both reach,",
                     mean_over_bins(at_equal_kl(results, arms[label], arms[f"{label.partition(',')[0]}, offline"])))
               for i, label in enumerate(over_offline)]
    claims += [claim("A more accurate proxy widens the advantage (expected, not tested).",
                     "peak, with the implicit proxy minus with the reward model,",
                     minus(peaks[implicit], peaks[learned], WIN)),
               claim("", "and its accuracy on held-out pairs, implicit minus reward model,",
                     [a - b for a, b in zip(by_proxy[implicit], by_proxy[learned])]),
               claim("", f"and the advantage with {many} minus that with {few}",
                     [a - b for a, b in zip(over_offline[learned], over_offline[f"{few}, online"])])]
    axes = style(figure, 2)
    colors = [RED, COLORS["online dpo"], TEAL, RED, TEAL]
    for (label, arm), color in zip(arms.items(), colors):
        axis = axes[0 if label.startswith(many) else 1]
        axis.set_title(f"IPO, {label.partition(',')[0]}", fontsize=10)
        draw_envelope(axis, results, arm, color, label.partition(", ")[2], dots=True)
    for axis in axes:
        axis.set_ylim(0, 0.75)
    return rows, claims


def coverage(results, figure):
    """The online run's own pairs, given again in order and shuffled; and offline pairs at the same settings."""
    arms = {"online": FINAL, "replayed in order": REPLAYS[1], "shuffled within 4 steps": REPLAYS[4],
            "within 32 steps": REPLAYS[32], "as a whole": REPLAYS[0], "offline pairs": OFFLINE}
    peaks = {label: peak(results, [run_]) for label, run_ in arms.items()}
    equal, seeds = sum(results["equal bytes"]), len(results["equal bytes"])
    claims = [
        {"paper": "Replayed in order, the stream gives the online run again.", "values": results["equal bytes"],
         "here": f"the same bytes of the final weights in {equal} of {seeds} seeds",
         "verdict": "holds" if equal == seeds else "does not hold"},
        claim("Shuffled as a whole, the same pairs are no longer as good: freshness counts, not the data's range.",
              "peak, online minus shuffled,", minus(peaks["online"], peaks["as a whole"], WIN)),
        claim("The same at the last step.", "online minus shuffled,",
              minus(last(results, FINAL), last(results, REPLAYS[0]), WIN)),
        claim("Small windows cost nothing.", "peak, online minus within 4 steps,",
              minus(peaks["online"], peaks["shuffled within 4 steps"], WIN), "not above 0"),
        claim("Shuffled online pairs are hardly better than offline pairs.", "peak, shuffled minus offline at the same "
              "beta and learning rate,", minus(peaks["as a whole"], peaks["offline pairs"], WIN), "not above 0"),
    ]
    axes = style(figure, 2)
    colors = dict(zip(arms, [RED, RED, "#c2673f", "#9a7b4f", GRAY, TEAL]))
    for label, run_ in arms.items():
        if label != "replayed in order":
            along(axes[0], results, run_, WIN, colors[label])
            along(axes[1], results, run_, "reverse_kl", colors[label],
                  "online = replayed" if label == "online" else label)
    axes[0].set_ylabel("win rate against the golden baseline")
    axes[1].set_ylabel("KL(policy || pi_ref), nats a sequence")
    return [peak_row(label, results, [run_]) for label, run_ in arms.items()], claims


def quality(results, figure):
    """Offline IPO on pairs whose sides come from pi_ref, the early and the final online policy."""
    labels = {"golden": "pi_ref, pi_ref (D_golden)", "final-final": "final, final", "sft-early": "pi_ref, early",
              "early-final": "early, final"}
    peaks = {kind: peak(results, arm) for kind, arm in QUALITY.items()}
    rows = []
    for kind, arm in QUALITY.items():
        pairs = results[f"pairs {kind}"]
        rows.append({**peak_row(labels[kind], results, arm),
                     "reward of the pairs": cell([of_seed["mean"] for of_seed in pairs], ".2f"),
                     "gap in a pair": cell([of_seed["gap"] for of_seed in pairs], ".2f")})
    golden = peaks["golden"]
    claims = [
        claim("Pairs from the final online policy, far better responses, are no better to learn from.",
              "peak, final-final minus D_golden,", minus(peaks["final-final"], golden, WIN), "not above 0"),
        claim("One side near pi_ref is what helps: pi_ref against early is as good as D_golden.",
              "peak, D_golden minus pi_ref-early,", minus(golden, peaks["sft-early"], WIN), "not above 0"),
        claim("Contrast alone does not help.", "peak, early-final minus D_golden,",
              minus(peaks["early-final"], golden, WIN), "not above 0"),
        claim("Pairs near pi_ref beat pairs far from it.", "peak, pi_ref-early minus final-final,",
              minus(peaks["sft-early"], peaks["final-final"], WIN)),
    ]
    axes = style(figure, 2)
    draw_dots(axes[0], [(labels[kind], [line[WIN] for line in lines], TEAL) for kind, lines in peaks.items()],
              "peak win rate against the golden baseline")
    draw_dots(axes[1], [("", [of_seed["mean"] for of_seed in results[f"pairs {kind}"]], GRAY) for kind in QUALITY],
              "mean golden reward of the pairs")
    return rows, claims


def classify(results, figure):
    """Proxy and policies as classifiers; whether that goes with the win rate; where the chosen log-probs go."""
    stream = results["classify"]
    mean_of = lambda name: [sum(s[name]) / len(s[name]) for s in stream]  # noqa: E731
    correlation = []
    for seed in range(len(stream)):
        lines = [line for run_ in OFFLINE_IPO for line in results[run_][seed][1:]]
        correlation.append(torch.corrcoef(torch.tensor([[line["data_accuracy"] for line in lines],
                                                        [line[WIN] for line in lines]]))[0, 1].item())
    on, off = last(results, FINAL), last(results, OFFLINE)
    rows = [{"classifier": label, "online stream": cell(mean_of(key)),
             "... first tenth": cell([s[key][0] for s in stream]), "... last tenth": cell([s[key][-1] for s in stream]),
             "its own samples": cell([s[f"{key}_self"] for s in stream]) if key != "proxy" else "",
             "D_golden": cell([line["data_accuracy"] for line in end]) if end else "",
             "held-out pairs": cell([line["accuracy"] for line in end] if end else results["setting accuracy"])}
            for label, key, end in (("proxy", "proxy", None), ("online policy", "online", on),
                                    ("offline policy", "offline", off))]
    claims = [
        claim("The proxy classifies the online stream better than the online policy does.", "difference in accuracy",
              [a - b for a, b in zip(mean_of("proxy"), mean_of("online"))]),
        claim("And better than the offline policy does.", "difference in accuracy",
              [a - b for a, b in zip(mean_of("proxy"), mean_of("offline"))]),
        claim("The proxy gets worse as the stream drifts away from its data.", "last tenth minus first tenth",
              [s["proxy"][-1] - s["proxy"][0] for s in stream], "below 0"),
        claim("The offline policy is the better classifier of D_golden.", "offline minus online policy, last step,",
              minus(off, on, "data_accuracy")),
        claim("And yet the worse policy.", "win rate, offline minus online,", minus(off, on, WIN), "below 0"),
        claim("Accuracy does not predict the win rate.", "correlation over the offline arm's checkpoints",
              correlation, "not above 0", "+.2f"),
        claim("The chosen response's log-prob falls in offline training.", "log-ratio at the last step, nats,",
              [line["data_chosen_logratio"] for line in off], "below 0", "+.1f"),
        claim("In online training, too.", "log-ratio at the last step, nats,",
              [line["data_chosen_logratio"] for line in on], "below 0", "+.1f"),
        claim("A policy cannot classify its own samples.", "online policy's accuracy minus 1/2",
              [s["online_self"] - 0.5 for s in stream], "not above 0"),
    ]
    axes = style(figure, 3)
    for key, color, label in (("proxy", "black", "proxy"), ("online", RED, "online policy"),
                              ("offline", TEAL, "offline policy")):
        band(axes[0], stream[0]["steps"], [s[key] for s in stream], color, label)
    axes[0].set_xlabel("step of the online stream")
    axes[0].set_ylabel("accuracy against the golden reward")
    for label, arm, one, color in (("online", ONLINE_IPO, FINAL, RED), ("offline", OFFLINE_IPO, OFFLINE, TEAL),
                                   ("shuffled", [REPLAYS[0]], REPLAYS[0], GRAY)):
        points = [line for run_ in arm for lines in results[run_] for line in lines[1:]]
        axes[1].scatter([line["data_accuracy"] for line in points], [line[WIN] for line in points], s=7, color=color,
                        alpha=0.5, lw=0)
        along(axes[2], results, one, "data_chosen_logratio", color, label)
    axes[1].set_xlabel("accuracy on D_golden")
    axes[1].set_ylabel("win rate against the golden baseline")
    axes[2].set_ylabel("log-ratio of D_golden's chosen, nats")
    return rows, claims


def loss(results, figure):
    """Online, shuffled and offline with three losses."""
    names = {"ipo": "IPO", "dpo": "DPO", "bo2": "Best-of-2"}
    rows = [peak_row(f"{names[kind]}, {arm}" + " (beta 0.1 only)" * (len(runs) == 1), results, runs)
            for kind, arms in LOSSES.items() for arm, runs in arms.items()]
    peaks = {kind: {arm: peak(results, runs) for arm, runs in arms.items()} for kind, arms in LOSSES.items()}
    claims = [claim(f"{names[kind]}: online beats offline.", "difference of the peaks",
                    minus(arms["online"], arms["offline"], WIN)) for kind, arms in peaks.items()]
    claims.append(claim("Best-of-2 on the shuffled stream is as good as online.", "peak, online minus shuffled,",
                        minus(peaks["bo2"]["online"], peaks["bo2"]["shuffled"], WIN), "not above 0"))
    axes = style(figure, 1, width=7)
    colors = {"online": RED, "shuffled": GRAY, "offline": TEAL}
    draw_dots(axes[0], [(f"{names[kind]}, {arm}", [line[WIN] for line in lines], colors[arm])
                        for kind, arms in peaks.items() for arm, lines in arms.items()],
              "peak win rate against the golden baseline")
    return rows, claims


def scale(results, figure):
    """Online and offline at four widths of the policy; pairs and proxy are those of the default width."""
    peaks = {width: {arm: peak(results, runs) for arm, runs in arms.items()} for width, arms in SCALE.items()}
    rows = [peak_row(f"width {width or 64}, {arm}", results, runs) for width, arms in SCALE.items()
            for arm, runs in arms.items()]
    gaps = {width or 64: minus(arms["online"], arms["offline"], WIN) for width, arms in peaks.items()}
    log_widths = torch.tensor([math.log2(width) for width in gaps])
    slopes = [(torch.cov(torch.stack([log_widths, torch.tensor(by_width)]))[0, 1] / log_widths.var()).item()
              for by_width in zip(*gaps.values())]
    claims = [claim("The gap is there at every size." if i == 0 else "", f"width {width}: peak, online minus offline,",
                    values) for i, (width, values) in enumerate(gaps.items())]
    claims.append(claim("It narrows slowly with size.", "change of the gap with each doubling of the width", slopes,
                        "below 0"))
    axes = style(figure, 2)
    widths = list(gaps)
    for arm, color in (("online", RED), ("offline", TEAL)):
        band(axes[0], widths, list(zip(*([line[WIN] for line in arms[arm]] for arms in peaks.values()))), color, arm,
             marker="o", ms=4)
    band(axes[1], widths, list(zip(*gaps.values())), "black", marker="o", ms=4)
    axes[1].axhline(0, color="gray", lw=0.8, ls=":")
    for axis, label in zip(axes, ("peak win rate against the golden baseline", "online minus offline")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(widths, widths)
        axis.set_xlabel("width of the policy")
        axis.set_ylabel(label)
    return rows, claims


def hypo(results, figure):
    """HyPO's lam from 0, which is DPO, at the last step: no checkpoint is picked. Full and partial coverage."""
    def row(label, run_):
        end = last(results, run_)
        return {"run": label, "win rate against pi_ref": cell([line["win_rate"] for line in end]),
                "golden reward V": cell([line["golden_reward"] for line in end], ".2f"),
                "KL": cell([line["reverse_kl"] for line in end], ".1f"),
                "J = V - beta KL": cell(objective(run_), ".2f"),
                "uncovered": cell([line["uncovered"] for line in end], ".2f")}

    def objective(run_):
        return [line["golden_reward"] - run_.beta * line["reverse_kl"] for line in last(results, run_)]

    name_of = lambda lam: f"HyPO, lam {lam}" if lam else "DPO"  # noqa: E731
    rows = [row(name_of(lam), run_) for lam, run_ in FULL_COVER.items()]
    rows += [row(f"partial coverage: {name_of(lam)}", run_) for lam, run_ in PARTIAL.items()]
    base, ours = last(results, FULL_COVER[0.0]), last(results, FULL_COVER[0.004])
    kl_over_lam = [[line["reverse_kl"] for line in last(results, run_)] for run_ in FULL_COVER.values()]
    claims = [
        claim("HyPO wins more than DPO.", "win rate against pi_ref, lam 0.004 minus DPO,",
              minus(ours, base, "win_rate")),
        claim("It keeps a smaller reverse KL.", "log of the ratio of the KLs",
              [math.log(a["reverse_kl"] / b["reverse_kl"]) for a, b in zip(ours, base)], "below 0", "+.2f"),
        claim("The objective is larger.", "J, lam 0.004 minus DPO,",
              [a - b for a, b in zip(objective(FULL_COVER[0.004]), objective(FULL_COVER[0.0]))], form="+.2f"),
        claim("The larger lam, the smaller the KL.", "largest step of log KL from one lam to the next",
              [max(math.log(b / a) for a, b in zip(kls, kls[1:])) for kls in zip(*kl_over_lam)], "below 0", "+.2f"),
        claim("With data that miss a part the KL is smaller, too.", "log of the ratio of the KLs, lam 0.004 to DPO,",
              [math.log(a["reverse_kl"] / b["reverse_kl"]) for a, b in
               zip(last(results, PARTIAL[0.004]), last(results, PARTIAL[0.0]))], "below 0", "+.2f"),
        claim("And the objective larger.", "J, lam 0.004 minus DPO,",
              [a - b for a, b in zip(objective(PARTIAL[0.004]), objective(PARTIAL[0.0]))], form="+.2f"),
        claim("And less is said that the data never show.", "share of such responses, lam 0.004 minus DPO,",
              minus(last(results, PARTIAL[0.004]), last(results, PARTIAL[0.0]), "uncovered"), "below 0"),
    ]
    axes = style(figure, 3)
    for lam, alpha in ((0.0, 1), (0.001, 0.4), (0.004, 1), (0.016, 0.65)):
        color = COLORS["hypo" if lam else "dpo"]
        along(axes[0], results, FULL_COVER[lam], "reverse_kl", color, name_of(lam), alpha=alpha)
        along(axes[1], results, FULL_COVER[lam], "win_rate", color, name_of(lam), alpha=alpha)
    axes[0].set_yscale("function", functions=(lambda kl: abs(kl) ** 0.5, lambda root: root**2))
    axes[0].set_ylim(0)
    axes[0].set_ylabel("KL(policy || pi_ref), nats (square-root scale)")
    axes[1].set_ylabel("win rate against pi_ref")
    for runs, label, marker in ((FULL_COVER, "full coverage", "o"), (PARTIAL, "partial", "s")):
        x = [estimate([line["reverse_kl"] for line in last(results, run_)])[0] for run_ in runs.values()]
        y = [estimate(objective(run_)) for run_ in runs.values()]
        axes[2].plot(x, [mean for mean, _, _ in y], color=GRAY, lw=0.8)
        for lam, kl, (mean, half, _) in zip(runs, x, y):
            color = COLORS["hypo" if lam else "dpo"]
            axes[2].errorbar(kl, mean, yerr=0 if half != half else half, color=color, marker=marker, capsize=3)
            axes[2].annotate(name_of(lam).replace("HyPO, ", ""), (kl, mean), color=color, fontsize=8, xytext=(5, 5),
                             textcoords="offset points")
        label_end(axes[2], y[0][0], label, GRAY)
    axes[2].set_xlabel("KL at the last step, nats a sequence")
    axes[2].set_ylabel("J = V - beta KL")
    return rows, claims


def extrapolate(results, figure):
    """Log-ratios of responses in and out of the data, along training."""
    arms = {"DPO": Run("dpo"), "HyPO": Run("hypo", lam=0.004), "Online IPO": FINAL, "PPO": Run("ppo", steps=0.6)}
    names = {"unseen best": "best_logratio", "preferred": "data_chosen_logratio", "rejected": "data_rejected_logratio"}
    rows = [{"run": label, **{f"{name}, nats": cell([line[key] for line in last(results, run_)], "+.1f")
                              for name, key in names.items()}} for label, run_ in arms.items()]
    claims = []
    for label, run_ in arms.items():
        end = last(results, run_)
        early = [lines[len(lines) // 4] for lines in results[run_]]
        claims += [claim(f"{label}: the best unseen response becomes likelier.", "log-ratio at a quarter of training, "
                         "nats,", [line["best_logratio"] for line in early], form="+.1f"),
                   claim(f"{label}: to the end.", "the same at the last step",
                         [line["best_logratio"] for line in end], form="+.1f"),
                   claim("... while the preferred ones of the data become less likely.", "log-ratio at the last step,",
                         [line["data_chosen_logratio"] for line in end], "below 0", "+.1f"),
                   claim("", "unseen best minus preferred,",
                         [line["best_logratio"] - line["data_chosen_logratio"] for line in end], form="+.1f")]
    axes = style(figure, 4, width=3.3)
    colors = {"unseen best": "#15803d", "preferred": "#1d4ed8", "rejected": "#b91c1c"}
    for axis, (label, run_) in zip(axes, arms.items()):
        for name, key in names.items():
            along(axis, results, run_, key, colors[name], name if label == "PPO" else "")
        axis.axhline(0, color="gray", lw=0.8, ls=":")
        axis.set_title(label, fontsize=10)
    axes[0].set_ylabel("log pi / pi_ref, nats a sequence")
    return rows, claims


def iterate(results, figure):
    """One run for each number of rounds, all labelled by the proxy; and offline pairs labelled by the golden reward."""
    arms = {f"{rounds} round" + "s" * (rounds > 1): run_ for rounds, run_ in ROUNDS.items()}
    arms["online"] = FINAL
    rows = [peak_row(label, results, [run_]) for label, run_ in arms.items()]
    rows.append(peak_row("offline, golden labels", results, [OFFLINE]))
    peaks = {label: peak(results, [run_]) for label, run_ in arms.items()}
    claims = [claim("Fresh data help.", "peak, online minus one round,", minus(peaks["online"], peaks["1 round"], WIN))]
    claims += [claim("Online or iterative, on-policy data in some form do." if label == "2 rounds" else "",
                     f"peak, {label} minus one round,", minus(peaks[label], peaks["1 round"], WIN))
               for label in ("2 rounds", "4 rounds", "8 rounds")]
    claims.append(claim("", "last step, online minus 8 rounds,",
                        minus(last(results, FINAL), last(results, ROUNDS[8]), WIN)))
    axes = style(figure, 2)
    shades = dict(zip(arms, ["#d4b483", "#c19a4b", "#a1761a", "#7c5a0e", RED]))
    for label, run_ in arms.items():
        along(axes[0], results, run_, WIN, shades[label])
        along(axes[1], results, run_, "reverse_kl", shades[label], label)
    along(axes[0], results, OFFLINE, WIN, TEAL)
    along(axes[1], results, OFFLINE, "reverse_kl", TEAL, "offline, golden labels")
    axes[0].set_ylabel("win rate against the golden baseline")
    axes[1].set_ylabel("KL(policy || pi_ref), nats a sequence")
    return rows, claims


# ---------------------------------------------------------------------------------------------------
# the command

# name: (function, its runs, heading in the README)
STUDIES = {
    "goodhart": (goodhart, [*ONLINE_IPO, *OFFLINE_IPO], "Online against offline at equal KL"),
    "algorithms": (algorithms, [*ONLINE_IPO, *OFFLINE_IPO, *DPO, *HYPO, *PPO], "Five algorithms, the same pairs"),
    "coverage": (coverage, [FINAL, OFFLINE, *REPLAYS.values()], "Is it the data that online training sees?"),
    "proxy": (proxy, [*ONLINE_IPO, *IMPLICIT, *OFFLINE_IPO, *FEW["online"], *FEW["offline"]],
              "How much does online training owe to its proxy?"),
    "quality": (quality, [run_ for runs in QUALITY.values() for run_ in runs], "Is it the quality of the responses?"),
    "classify": (classify, [CLASSIFY, *ONLINE_IPO, *OFFLINE_IPO, REPLAYS[0]], "Is it better classification?"),
    "loss": (loss, [run_ for arms in LOSSES.values() for runs in arms.values() for run_ in runs],
             "Is it the contrastive loss?"),
    "scale": (scale, [run_ for arms in SCALE.values() for runs in arms.values() for run_ in runs], "Is it the size?"),
    "iterate": (iterate, [FINAL, OFFLINE, *ROUNDS.values()], "How fresh must the data be?"),
    "hypo": (hypo, [*FULL_COVER.values(), *PARTIAL.values()], "HyPO against DPO"),
    "extrapolate": (extrapolate, [Run("dpo"), Run("hypo", lam=0.004), FINAL, Run("ppo", steps=0.6)],
                    "Where does the probability go?"),
}
KEPT = ("step", "reverse_kl", "win_rate", "win_rate_picks", "win_rate_judges", "golden_win_rate_picks",
        "golden_win_rate_judges", "golden_reward", "sampled_proxy_reward", "accuracy", "data_accuracy",
        "data_chosen_logratio", "data_rejected_logratio", "best_logratio", "uncovered", "response_length")


def load_results(options, jobs: list[Run]) -> dict:
    """What the functions above take: the evaluations of every run, and what some studies need beside."""
    folders = [options.work / str(seed) for seed in options.seeds]
    summaries = lambda job: [json.loads((folder / job.name / "summary.json").read_text()) for folder in folders]  # noqa: E731
    results = {job: [[{key: line[key] for key in KEPT if key in line} for line in read_metrics(folder / job.name)
                      if "reverse_kl" in line] for folder in folders] for job in jobs if job != CLASSIFY}
    results["core-minutes"] = sum(summary.get("seconds", 0) for job in jobs for summary in summaries(job)) / 60
    for setting in {setting_of(job) for job in jobs}:
        results[f"{setting.name} accuracy"] = [summary["reward_accuracy"] for summary in summaries(setting)]
    if CLASSIFY in jobs:
        results["classify"] = summaries(CLASSIFY)
    if REPLAYS[1] in jobs:
        weights = lambda folder, job: (folder / job.name / "policy" / "model.safetensors").read_bytes()  # noqa: E731
        results["equal bytes"] = [weights(folder, FINAL) == weights(folder, REPLAYS[1]) for folder in folders]
    for kind, arm in QUALITY.items():
        if set(arm) <= set(jobs):
            files = [folder / arm[0].name / "pairs.jsonl" for folder in folders]
            results[f"pairs {kind}"] = [of_pairs(data.read_rows(path)) for path in files]
    return results


def of_pairs(pairs: list[dict]) -> dict:
    """Mean golden reward of the responses of some pairs, and the mean distance within a pair."""
    chosen, rejected = ([data.golden_reward(pair["prompt"], pair[side]) for pair in pairs]
                        for side in ("chosen", "rejected"))
    return {"mean": sum(chosen + rejected) / (2 * len(pairs)),
            "gap": sum(abs(a - b) for a, b in zip(chosen, rejected)) / len(pairs)}


def conclude(options, name: str) -> None:
    """results/NAME.json and NAME.png of a study whose runs are done; prints its table and its verdicts."""
    from matplotlib.figure import Figure

    function, jobs, title = STUDIES[name]
    jobs = list(dict.fromkeys(jobs))
    results = {**load_results(options, jobs), "pairs": options.pairs}
    figure = Figure(layout="constrained")
    rows, claims = function(results, figure)
    for axis in figure.axes:
        spread_labels(axis)
    options.results.mkdir(parents=True, exist_ok=True)
    beside = options.results / f"{name}.tmp.png"
    figure.savefig(beside, dpi=110)
    os.replace(beside, options.results / f"{name}.png")
    chip = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    report = {
        "study": name, "title": title, "command": f"python study.py {name}" + options.flags,
        "seeds": list(options.seeds), "settings": {key: getattr(options, key) for key in FULL if key != "seeds"},
        "hardware": f"{chip}, torch {torch.__version__.partition('+')[0]}",
        "table": rows, "claims": claims,
        "evaluations": {job.name: results[job] for job in jobs if job in results},
        **{key: value for key, value in results.items() if isinstance(key, str)},
    }
    rounded = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"),
                         parse_constant=lambda text: None)  # one seed has no interval
    data.write_text(options.results / f"{name}.json", json.dumps(rounded) + "\n")
    print(f"\n{title} ({name})\n\n{as_text(rows)}\n")
    for line in claims:
        print("-", sentence(line))
    print(f"\n{options.results}/{name}.png, {options.results}/{name}.json")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=[*STUDIES, "all"], metavar="STUDY", help=", ".join(STUDIES) + ", or all")
    add("--seeds", type=int, help="how many seeds, 0, 1, ... (default 5; with --quick 2)")
    add("--quick", action="store_true", help="short runs on few pairs, kept apart in runs/study-quick: they show that "
        "everything works, not what comes out")
    add("--model", default="tiny", help="what to study: tiny, a transformers directory, or a hub name (default tiny)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--jobs", type=int, help="runs at a time (default: the number of cores for tiny on the CPU, else 1)")
    options = parser.parse_args(argv)
    defaults = QUICK if options.quick else FULL
    for key, value in defaults.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    if options.seeds < 1 or (options.jobs is not None and options.jobs < 1):
        parser.error("--seeds and --jobs must be at least 1")
    tiny = options.model == "tiny"
    if not tiny:
        options.batch_size, options.eval_samples = 8, 64
    names = [options.study] if options.study != "all" else [name for name in STUDIES if tiny or name != "scale"]
    if names == ["scale"] and not tiny:
        parser.error("scale makes built-in models of four widths: it takes no --model")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.jobs = options.jobs or (cores if tiny and options.device == "cpu" else 1)
    options.threads = max(1, cores // options.jobs)
    kind = "study" + "-quick" * options.quick + ("" if tiny else "-" + re.sub(r"\W+", "-", options.model).strip("-"))
    options.work = Path("runs") / kind
    options.flags = "".join([" --quick" * options.quick, "" if tiny else f" --model {options.model}",
                             f" --seeds {options.seeds}" * (options.seeds != defaults["seeds"])])
    options.seeds = range(options.seeds)
    standard = tiny and not options.quick and len(options.seeds) >= FULL["seeds"]
    options.results = Path("results") if standard else options.work / "results"  # a trial must not replace them
    run_jobs(options, [(seed, job) for name in names for job in STUDIES[name][1] for seed in options.seeds])
    for name in names:
        path = options.results / f"{name}.json"
        n = len(json.loads(path.read_text(encoding="utf-8"))["seeds"]) if path.exists() else 0
        if n > len(options.seeds):
            print(f"\n{path} has {n} seeds, more than these {len(options.seeds)}: it stays as it is")
        else:
            conclude(options, name)
    if standard:
        write_readmes(Path(), list(STUDIES))


if __name__ == "__main__":
    run.start(main, again="the same command goes on where it stopped")

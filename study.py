"""Every experiment of the two papers, one command each."""
import argparse
from pathlib import Path

import run
from experiments import FINAL, OFFLINE, Run, run_jobs

BETAS = (0.03, 0.1, 0.3)


def sweep(*args, lrs=(1.0,), **kwargs) -> list[Run]:
    return [Run(*args, beta=beta, lr=lr, **kwargs) for lr in lrs for beta in BETAS]


ONLINE_IPO, OFFLINE_IPO = sweep("ipo", "online"), sweep("ipo", lrs=(1.0, 0.4))  # offline has the wider sweep
DPO, PPO = sweep("dpo"), sweep("ppo", steps=0.6)
HYPO = [Run("hypo", lam=lam) for lam in (0.001, 0.004, 0.016)]
REPLAYS = {window: Run("ipo", "replay", window=window) for window in (1, 4, 32, 0)}
QUALITY = {pairs: sweep("ipo", data=pairs) for pairs in ("golden", "final-final", "sft-early", "early-final")}
LOSSES = {
    "ipo": {"online": ONLINE_IPO, "shuffled": [REPLAYS[0]], "offline": sweep("ipo")},
    "dpo": {"online": sweep("dpo", "online"), "shuffled": [Run("dpo", "replay", window=0)], "offline": DPO},
    "bo2": {"online": [Run("bo2", "online", lr=lr) for lr in (1.0, 0.4)],
            "shuffled": [Run("bo2", "replay", lr=lr, window=0) for lr in (1.0, 0.4)],
            "offline": [Run("bo2", lr=lr) for lr in (1.0, 0.4)]},
}
WIDTHS = (16, 32, 0, 128)  # of the policy; 0: the default model, whose width is 64
SCALE = {width: {"online": [Run("ipo", "online", beta=beta, width=width) for beta in BETAS[:2]],
                 "offline": [Run("ipo", beta=beta, width=width) for beta in BETAS[:2]]} for width in WIDTHS}
PARTIAL = {lam: Run("hypo" if lam else "dpo", data="covered", lam=lam) for lam in (0.0, 0.004, 0.016)}
ROUNDS = {rounds: Run("ipo", "iterative", rounds=rounds) for rounds in (1, 2, 4, 8)}
FULL = dict(seeds=5, steps=200, batch_size=64, eval_every=25, eval_samples=512, pairs=400)
QUICK = dict(seeds=2, steps=48, batch_size=32, eval_every=16, eval_samples=128, pairs=200)

STUDIES = {
    "goodhart": [FINAL, OFFLINE, *ONLINE_IPO, *OFFLINE_IPO, *DPO, *HYPO, *PPO],
    "coverage": [*REPLAYS.values()],
    "hypo": [*DPO, *HYPO, *PARTIAL.values()],
    "iterate": [*ROUNDS.values()],
    "quality": [run_ for runs in QUALITY.values() for run_ in runs],
    "classify": ["classify"],
    "extrapolate": [],
    "loss": [run_ for arms in LOSSES.values() for runs in arms.values() for run_ in runs],
    "scale": [run_ for arms in SCALE.values() for runs in arms.values() for run_ in runs],
}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", choices=[*STUDIES, "all"])
    p.add_argument("--seeds", type=int)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--model", default="tiny")
    p.add_argument("--device", default="cpu")
    p.add_argument("--jobs", type=int, default=2)
    options = p.parse_args(argv)
    defaults = QUICK if options.quick else FULL
    for key, value in defaults.items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    options.threads = 1
    options.work = Path("runs") / ("study-quick" if options.quick else "study")
    names = list(STUDIES) if options.study == "all" else [options.study]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    run_jobs(options, [(seed, run_) for name in names for run_ in STUDIES[name] for seed in seeds])


if __name__ == "__main__":
    run.start(main)

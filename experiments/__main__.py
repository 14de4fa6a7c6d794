"""The experiments of the two papers, one command each.

    python -m experiments main               # the five primary claims: 25 minutes on two cores
    python -m experiments all                # every study: three hours on two cores
    python -m experiments all --quick        # two seeds, few and short runs: to see that everything works
    python -m experiments reviews            # HyPO, DPO, online and offline IPO, PPO on a real model: hours
    python -m experiments pages              # results/README.md, its pictures, README's table, from results/*.json
    python -m experiments mean RUN RUN ...   # a table of any runs, with the means of those that differ in their seed

A command does the runs that are missing; then come report, table, verdicts and picture. What each study asks was
declared before its runs, in experiments/studies.py; the setting is in experiments/setting.py.

    main          online against offline, off support, shuffled, rounds, HyPO against DPO

Song et al. 2024 (arXiv 2406.01462) add to offline data the KL on online samples.

    hypo          HyPO against DPO: KL, lam, beta, data that miss what pi_ref rarely says (Table 1, Figure 1)
    extrapolate   does probability go to good responses that the data do not hold? (Figure 2)

Tang et al. 2024 (arXiv 2405.08448) ask why online preference fine-tuning beats offline, when both know the same labels.

    fitting       the same in a second world, whose golden reward is no sum over words
    goodhart      what over-optimisation is, offline and online (their Figure 1)
    coverage      is it the data? the online run's own pairs, replayed in order and shuffled (Figures 4, 13)
    iterate       how fresh must the data be? one to eight rounds with equally many labels
    classify      is it better classification? proxy and policies as classifiers (Figures 6, 7, 8)
    proxy         another proxy of the same labels: the offline policy itself
    labels        labels from Bradley-Terry instead of the preference's sign
    quality       is it better responses? offline pairs from better policies (Figures 5, 12)
    loss          is it the contrastive loss? DPO and Best-of-2 (Figure 9)
    scale         is it the size? policies of four widths with the same proxy (Figures 10, 11)

KL is KL(pi || pi_ref). Intervals are 95 % by Student over seeds, verdicts corrected by Holm within a study. Finished
runs are in runs/study and are not done again. Reports are in results/: a study of tiny with ten seeds or more replaces
the one that is there, unless that has more; all others are trials and leave theirs beside their runs.
"""

import argparse
import os
import re
import signal
from pathlib import Path

import torch

import run
from data import read_pairs
from eval import read_metrics, read_summary, table
from experiments import pages, reviews, stats
from experiments.jobs import directory, run_jobs
from experiments.setting import CLASSIFY, FINAL, Run, pairs_file, setting_of
from experiments.stats import column
from experiments.studies import QUALITY, REPLAYS, STUDIES
from lm import LM
from world import golden_judge

FULL = dict(steps=100, batch_size=64, lr=1e-3, eval_every=25, eval_samples=512, pairs=2000)
QUICK = dict(steps=24, batch_size=32, lr=1e-3, eval_every=8, eval_samples=128, pairs=200)
FIRST_SEED = 10
PRETRAINED = dict(batch_size=8, lr=2e-5, eval_samples=64)  # in place of these, if the model is not tiny
KEPT = ("step", "reverse_kl", "off_support", "unlikely", "win_rate", "golden_win_rate", "golden_reward", "good",
        "sampled_proxy_reward", "accuracy", "data_accuracy", "data_chosen_logratio", "data_rejected_logratio",
        "best_logratio", "response_length")


def seeds_of(options, name: str) -> range:
    """The seeds of a study."""
    return range(options.first_seed, options.first_seed + (
        options.seeds or (2 if options.quick else STUDIES[name].seeds)))


def collect(options, seeds: range, jobs: list[Run]) -> dict:
    """The evaluations of every run, and what some studies need beside."""
    def folders(job: Run) -> list[Path]:
        return [directory(options, seed, job) for seed in seeds]

    def measured(job: Run) -> list[dict]:
        return [run.read_json(folder / "job.json") for folder in folders(job)]

    trained = [job for job in jobs if job.source]
    found: dict = {"evaluations": {job.name: [
        [{key: line[key] for key in KEPT if key in line} for line in read_metrics(folder) if "reverse_kl" in line]
        for folder in folders(job)] for job in trained}}
    found["core-minutes"] = sum(read_summary(folder)["seconds"] for job in trained for folder in folders(job)) / 60
    for made in dict.fromkeys(setting_of(job) for job in trained):
        of_seeds = measured(made)
        found[f"{made.name} accuracy"] = column(of_seeds, "reward_accuracy")
        found.setdefault("frontier", of_seeds[0]["frontier"])
    if CLASSIFY in jobs:
        found["classify"] = measured(CLASSIFY)
    if REPLAYS[1] in jobs:
        online, again = ([(folder / "policy" / "model.safetensors").read_bytes() for folder in folders(job)]
                         for job in (FINAL, REPLAYS[1]))
        found["equal bytes"] = [a == b for a, b in zip(online, again)]
    for kind, arm in QUALITY.items():
        if set(arm) <= set(jobs):
            made = setting_of(arm[0]) if kind == "golden" else arm[0]
            found[f"pairs {kind}"] = [of_pairs(pairs_file(pairs), policy / "policy")
                                      for pairs, policy in zip(folders(made), folders(arm[0]))]
    return found


def of_pairs(path: Path, policy: Path) -> dict:
    """Mean golden reward of the responses of some pairs, and the mean distance within a pair."""
    lm, pairs = LM.load(str(policy)), read_pairs(path)
    prompts, *sides = ([lm.decode(ids) for ids in side] for side in list(zip(*pairs))[:3])
    chosen, rejected = (golden_judge(prompts, side) for side in sides)
    return {"mean": sum(chosen + rejected) / (2 * len(pairs)),
            "gap": sum(abs(a - b) for a, b in zip(chosen, rejected)) / len(pairs)}


def conclude(options, name: str) -> None:
    """results/NAME.json of a study whose runs are done; prints its table and its verdicts."""
    study, seeds = STUDIES[name], seeds_of(options, name)
    found = {**collect(options, seeds, list(dict.fromkeys(study.runs))), "pairs": options.pairs}
    rows, claims = study.conclude(stats.Results(found))
    stats.decide(claims)
    for line in claims:  # at a fixed KL, a seed counts where both arms reach it
        n = len(line["values"])
        line["here"] += f" ({n} of {len(seeds)} seeds)" * (n < len(seeds))
    report = {
        "study": name, "title": study.title, "command": f"python -m experiments {name}{options.flags}",
        "commit": run.commit(), "seeds": list(seeds),
        "settings": {key: getattr(options, key) for key in FULL},
        "hardware": stats.hardware(options.device), "table": rows, "claims": claims, **found}
    run.write_text(options.results / f"{name}.json", stats.as_json(report))
    print(f"{pages.as_text(report)}\n\n{options.results}/{name}.png, {options.results}/{name}.json")


def parse(argv):
    """(options, names of the studies) of the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", choices=[*STUDIES, "all", "reviews", "pages", "mean"], metavar="NAME",
        help=", ".join(STUDIES) + ", all, reviews, pages or mean")
    add("runs", nargs="*", metavar="RUN", help="directories of runs, for mean alone")
    several = run.number(int, 1, 1000)
    add("--seeds", type=several, help="how many seeds (default: what the study says, 10 or 6; for reviews 2 to 5, and "
        "not more; with --quick 2)")
    add("--first-seed", type=run.number(int, 0, 10**6), default=FIRST_SEED,
        help=f"the first of them (default {FIRST_SEED})")
    add("--quick", action="store_true", help="short runs on few pairs, kept apart in runs/study-quick: they show that "
        "everything works, not what comes out")
    add("--model", help="what to study: tiny, a transformers directory, or a hub name (default tiny, for reviews "
        f"{reviews.MODEL})")
    add("--device", type=run.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--jobs", type=several, help="runs at a time (default: the number of cores for tiny and for reviews on "
        "the CPU, else 1)")
    options = parser.parse_args(argv)
    if bool(options.runs) != (options.name == "mean"):
        parser.error("mean needs directories of runs, and nothing else takes them")
    film, other_seeds = options.name == "reviews", options.first_seed != FIRST_SEED
    given, options.model = options.model, options.model or (str(reviews.MODEL) if film else "tiny")
    tiny = options.model == "tiny"
    if film and tiny:
        parser.error("reviews needs a pretrained --model")
    if options.name in ("mean", "pages") and (
            options.seeds or other_seeds or options.quick or options.jobs or not tiny):
        parser.error(f"{options.name} makes no runs: it takes no --seeds, --first-seed, --quick, --model or --jobs")
    defaults = {**(QUICK if options.quick else FULL), **({} if tiny else PRETRAINED)}
    if options.name == "scale" and not tiny:
        parser.error("scale makes built-in models of four widths: it takes no --model")
    vars(options).update(defaults, flags="".join([
        " --quick" * options.quick, f" --model {given}" * (not tiny and given is not None),
        f" --seeds {options.seeds}" if options.seeds else "",
        f" --first-seed {options.first_seed}" * other_seeds]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.jobs = options.jobs or (cores if (tiny or film) and options.device == "cpu" else 1)
    options.threads = max(1, cores // options.jobs)
    options.work = Path("runs") / ("study" + "-reviews" * film + "-quick" * options.quick + (
        "-" + re.sub(r"\W+", "-", given).strip("-") if given not in (None, "tiny") else ""))
    standard = (tiny and not other_seeds or film and given is None) and not options.quick and (
        options.seeds is None or options.seeds >= 10 and not film)
    options.results = Path("results") if standard else options.work / "results"  # a trial must not replace them
    return options, [options.name] if options.name != "all" else [name for name in STUDIES if tiny or name != "scale"]


def main(argv=None) -> None:
    options, names = parse(argv)
    if options.name == "mean":
        print(table(stats.rows_of_runs(options.runs)))
        return
    if options.name == "pages":
        pages.write_pages(Path("results"), list(STUDIES))
        pages.write_readme(Path("."))
        reviews.publish(Path("."))
        return
    if options.name == "reviews":
        options.steps = 3 if options.quick else reviews.STEPS
        with run.alone(options.work):
            reviews.main(options)
        return
    with run.alone(options.work):
        for name in names:
            seeds = seeds_of(options, name)
            run_jobs(options, [(seed, job) for job in STUDIES[name].runs for seed in seeds])
            path = options.results / f"{name}.json"
            n = len(run.read_json(path)["seeds"]) if path.exists() else 0
            if n > len(seeds):
                print(f"\n{path} has {n} seeds, more than these {len(seeds)}: it stays as it is")
            else:
                conclude(options, name)
                pages.write_pages(options.results, [name])


def start() -> None:
    """The command; SIGTERM ends it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run.start(main, again="the same command goes on where it stopped")


if __name__ == "__main__":
    start()

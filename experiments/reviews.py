"""Does it hold on a real language model? SmolLM2-135M on film reviews, see docs/real-models.md.

    python recipes/smollm2.py runs/smollm2                        # recipes/README.md says what to install
    python recipes/movie_reviews.py runs/reviews --held-out 512
    python -m experiments reviews                                 # about six hours on one core
    python -m experiments reviews --first-seed 20 --jobs 8        # once more: ten minutes on an H100

Declared before the runs. The learning rate and KL_FIXED were chosen on seed 1000.

    seeds       from 10 on, as many as ARMS says. A seed decides pairs, their order and all samples; pi_ref is one
    arms        ARMS, all from one pi_ref, with the same 384 labelled pairs, steps, batch and falling rate; the last 6
                of 30 layers learn. The pairs that online IPO samples are labelled by the log-ratio of the offline IPO
                run of its seed: it knows no other label
    measures    win rate against pi_ref by the first judge, which labelled the pairs, and by the second, which nobody
                trains on; KL; off_support; length. On 512 held-out openings after the last step, on 64 of them after a
                third and two thirds
    claims      CLAIMS, at the last step, and at a fixed KL along training by interpolation between checkpoints, for no
                arm has a sweep here. The second judge decides: the first can be gamed. PPO on a reward model of the
                same pairs has no claim
    verdict     Student's test over seeds of the difference within a seed, corrected by Holm for all claims; nearer to 0
                than 0.03 of a win rate, 0.01 of off_support or 0.1 of a log counts as equal
"""

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import data
import run
from eval import (
    COLORS,
    IN_CELL,
    ROOT_SCALE,
    Evaluator,
    aligned,
    panels,
    read_metrics,
    read_responses,
    read_summary,
    reload,
)
from experiments import pages, stats
from lm import text_of
from run import UserError

MODEL, TASK = Path("runs/smollm2"), Path("runs/reviews")
STEPS, OPENINGS, KL_FIXED = 48, 512, 1.0
SETTINGS = {"--data": TASK, "--pairs": 384, "--batch-size": 8, "--lr": 3e-4, "--train-layers": 6, "--eval-samples": 64,
            "--dtype": "float32"}
ARMS: dict[str, tuple[str, dict, int]] = {  # the command, its own flags, how many seeds
    "DPO": ("dpo.py", {}, 5),
    "HyPO": ("hypo.py", {"--lam": 0.004}, 5),
    "HyPO, lam 0.02": ("hypo.py", {"--lam": 0.02}, 5),
    "offline IPO": ("dpo.py", {"--loss": "ipo"}, 4),
    "online IPO": ("dpo.py", {"--loss": "ipo", "--sampling": "online"}, 4),
    "PPO": ("rlhf.py", {"--reward-epochs": 3}, 2),
}
NEEDS = {"online IPO": "offline IPO"}  # whose policy is its judge
COLOR = {"DPO": COLORS["dpo"], "HyPO": COLORS["hypo"], "HyPO, lam 0.02": "#f59e0b", "offline IPO": COLORS["ipo"],
         "online IPO": COLORS["online ipo"], "PPO": COLORS["ppo"]}
SECOND = "second_win_rate"
CLAIMS = [  # what the papers say, of two arms, a measure, where: at the last step or at KL_FIXED; what is expected
    ("HyPO stays nearer to pi_ref than DPO.", "HyPO", "DPO", "log KL", "end", "below", 0.1),
    ("It wins more.", "HyPO", "DPO", SECOND, "end", "above", 0.03),
    ("It wins more at equal KL.", "HyPO", "DPO", SECOND, "kl", "above", 0.03),
    ("It leaves the support less.", "HyPO", "DPO", "off_support", "end", "below", 0.01),
    ("Online beats offline.", "online IPO", "offline IPO", SECOND, "end", "above", 0.03),
    ("Online beats offline at equal KL.", "online IPO", "offline IPO", SECOND, "kl", "above", 0.03),
    ("It leaves the support less.", "online IPO", "offline IPO", "off_support", "end", "below", 0.01),
]
NAMES = {SECOND: "win rate by the second judge", "off_support": "off support", "log KL": "log of the KL"}
KEPT = ("step", "win_rate", SECOND, "reverse_kl", "off_support", "response_length", "accuracy")


# ---------------------------------------------------------------------------------------------------
# the runs

def directory(options, seed: int, arm: str) -> Path:
    """Where an arm's run is."""
    return options.work / str(seed) / arm.lower().replace(", ", "-").replace(" ", "-")


def beside(out: Path, form: str) -> Path:
    """Its command (json) and what it printed (log), beside the run, in whose directory only it writes."""
    return out.with_name(f"{out.name}.{form}")


def command(options, seed: int, arm: str) -> list[str]:
    """An arm's command for a seed."""
    program, flags, _ = ARMS[arm]
    flags = {"--model": options.model, "--device": options.device, **SETTINGS, "--steps": options.steps,
             "--eval-every": math.ceil(options.steps / 3), "--seed": seed, **flags}
    if options.quick:
        flags |= {"--eval-samples": 8, "--pairs": 16, "--sft-steps": 2}
    if "--sampling" in flags:
        flags["--judge"] = directory(options, seed, NEEDS[arm])
    return [program, *(str(word) for pair in flags.items() for word in pair),
            "--out", str(directory(options, seed, arm))]


def refuse_other_settings(options, seed: int, arm: str) -> None:
    """UserError if a finished run was made by another command."""
    out = directory(options, seed, arm)
    path = beside(out, "json")
    then = run.read_json(path)["words"] if path.exists() else None
    if read_summary(out) and then != command(options, seed, arm):
        raise UserError(f"{out} was made by another command: {' '.join(then or ['unknown'])}; move {options.work} "
                        "away, or give what it was made with")


def seeds_of(options, arm: str) -> range:
    """The seeds of an arm; --seeds and --quick take the first of them."""
    own = range(options.first_seed, options.first_seed + ARMS[arm][2])
    return own[:options.seeds or (2 if options.quick else None)]


def make_runs(options) -> None:
    """Do what is missing, options.jobs commands at a time."""
    recipes = {options.model: f"smollm2.py {MODEL}", TASK: f"movie_reviews.py {TASK} --held-out {OPENINGS}"}
    for path, recipe in recipes.items():
        if not Path(path).is_dir():
            raise UserError(f"{path} is not there; make it with: python recipes/{recipe} (recipes/README.md says what "
                            "to install)")
    there = len(run.read_rows(TASK / "held_out_prompts.jsonl"))
    if there < OPENINGS:
        raise UserError(f"{TASK} holds out {there} openings, and {OPENINGS} are asked for; move it away and make it "
                        f"again with: python recipes/{recipes[TASK]}")
    runs = [(seed, arm) for arm in ARMS for seed in seeds_of(options, arm)]
    runs.sort(key=lambda seed_and_arm: seed_and_arm[0])  # seed by seed, in the order of ARMS
    for seed, arm in runs:
        refuse_other_settings(options, seed, arm)
    processes: list[subprocess.Popen] = []
    stop = threading.Event()

    def work(seed: int, arm: str, before: Future | None) -> str | None:
        """One command, once the one that it needs is done; returns why it failed."""
        out, words = directory(options, seed, arm), command(options, seed, arm)
        if before and (why := before.result()):
            return f"{out} was not started, for {why}"
        run.write_text(beside(out, "json"), json.dumps({"words": words}) + "\n")
        last = ["-m", "experiments.reviews", str(out), str(16 if options.quick else OPENINGS)]
        for one, done in ((words + ["--resume"], out / "summary.json"), (last, out / "again" / "metrics.jsonl")):
            if stop.is_set() or done.exists():
                continue
            with open(beside(out, "log"), "a", encoding="utf-8") as log:
                process = subprocess.Popen([sys.executable, *one], stdout=log, stderr=log, env={
                    **os.environ, "OMP_NUM_THREADS": str(options.threads)})
            processes.append(process)
            if process.wait():
                return f"{out} failed; {beside(out, 'log')} says why"
        (out / "checkpoint.pt").unlink(missing_ok=True)  # as large as three models
        return None

    with ThreadPoolExecutor(options.jobs) as pool, tqdm(
            total=len(runs) * options.steps, initial=steps_taken(options, runs), desc=f"{len(runs)} runs", unit="step",
            disable=None) as bar:
        futures: dict[tuple[int, str], Future] = {}
        for seed, arm in runs:  # what another one needs comes before it
            futures[seed, arm] = pool.submit(work, seed, arm, futures.get((seed, NEEDS.get(arm, ""))))
        try:
            while not all(future.done() for future in futures.values()):
                time.sleep(1)
                bar.update(steps_taken(options, runs) - bar.n)
        except BaseException:
            stop.set()
            for process in processes:
                process.terminate()
            raise
    failed = [why for future in futures.values() if (why := future.result())]
    if failed:
        raise UserError("some runs failed, and the same command tries again:\n  " + "\n  ".join(failed))


def steps_taken(options, runs) -> int:
    """Of all runs."""
    logs = (directory(options, *one) / "metrics.jsonl" for one in runs)
    return sum(max(0, log.read_bytes().count(b"\n") - 1) for log in logs if log.exists())


# ---------------------------------------------------------------------------------------------------
# what came

def evaluations_of(out: Path) -> list[dict]:
    """Of one run; the last one on all openings, but for the accuracy, which is of held-out pairs."""
    lines = [line for line in read_metrics(out) if "reverse_kl" in line]
    lines[-1] |= run.read_rows(out / "again" / "metrics.jsonl")[-1]
    return [{key: line[key] for key in KEPT} for line in lines]


def report_of(options) -> dict:
    """Everything that came."""
    runs = {arm: [directory(options, seed, arm) for seed in seeds_of(options, arm)] for arm in ARMS}
    evaluations = {arm: [*map(evaluations_of, folders)] for arm, folders in runs.items()}
    summaries = [read_summary(folder) for folders in runs.values() for folder in folders]
    return {
        "command": f"python -m experiments reviews{options.flags}",
        "commit": ", ".join(sorted({summary["commit"] for summary in summaries})),
        "seeds": {arm: list(seeds_of(options, arm)) for arm in ARMS},
        "commands": {arm: " ".join(["python", *command(options, options.first_seed, arm)]) for arm in ARMS},
        "hardware": stats.hardware(options.device),
        "hours": sum(summary["seconds"] for summary in summaries) / 3600,
        "reward_models": [
            run.read_rows(folder / "reward" / "metrics.jsonl")[-1]["reward_accuracy"] for folder in runs["PPO"]],
        "evaluations": evaluations, "claims": claims_of(evaluations), "openings": openings(options)}


def claims_of(evaluations: dict[str, list]) -> list[dict]:
    """CLAIMS with their differences, for each arm the evaluations of each seed, and with their verdicts."""
    claims = []
    for paper, one, other, name, where, expected, margin in CLAIMS:
        values = [difference(a, b, name, where) for a, b in zip(evaluations[one], evaluations[other])]
        what = f"{NAMES[name]}, {one} minus {other}" + f", at {KL_FIXED:g} nats" * (where == "kl")
        there = [value for value in values if value is not None]
        claims.append(stats.claim(paper, what, there, expected, margin)
                      | {"here": f"{what}, {len(there)} seeds: {stats.cell(there, '+.3f')}"})
    stats.decide(claims)
    return claims


def difference(lines: list[dict], others: list[dict], name: str, where: str) -> float | None:
    """Of two runs; None where one of them does not reach the KL."""
    if where == "kl":
        a, b = along(lines, name), along(others, name)
        return None if a is None or b is None else a - b
    if name == "log KL":
        return math.log(lines[-1]["reverse_kl"] / others[-1]["reverse_kl"])
    return lines[-1][name] - others[-1][name]


def along(lines: list[dict], name: str) -> float | None:
    """A metric where a run first passes KL_FIXED nats, on the line between the checkpoints on either side."""
    for before, after in zip(lines, lines[1:]):
        low, high = before["reverse_kl"], after["reverse_kl"]
        if low <= KL_FIXED <= high:
            return before[name] + (KL_FIXED - low) / (high - low) * (after[name] - before[name])
    return None


def openings(options, n: int = 5) -> list[dict]:
    """What the arms of the first seed answer to the first held-out openings, after the last step."""
    rows = {arm: read_responses(directory(options, options.first_seed, arm) / "again") for arm in ARMS}
    first = rows["DPO"]
    return [{"opening": text_of(first[i]["prompt"]), "pi_ref": first[i]["ref_response"],
             **{arm: rows[arm][i]["response"] for arm in ARMS}} for i in range(n)]


def together(reports: list[dict]) -> dict[str, list]:
    """The evaluations of all reports: for each arm those of each seed."""
    return {arm: [lines for report in reports for lines in report["evaluations"][arm]] for arm in ARMS}


def table(evaluations: dict[str, list]) -> list[list[str]]:
    """Rows of cells: each arm at each checkpoint, means over seeds."""
    rows = [["arm", "seeds", "step", "first judge", "second judge", "KL, nats", "off support", "length", "accuracy"]]
    for arm, by_seed in evaluations.items():
        for lines in list(zip(*by_seed))[1:]:
            column = {name: stats.column(list(lines), name) for name in KEPT}
            rows.append([arm, str(len(lines)), str(lines[0]["step"]), stats.share(column["win_rate"]),
                         stats.share(column[SECOND]), stats.cell(column["reverse_kl"], ".2f"),
                         stats.share(column["off_support"]), stats.cell(column["response_length"], ".1f"),
                         stats.share(column["accuracy"], ".2f")])
    return rows


def differences(reports: list[dict]) -> list[list[str]]:
    """Rows of cells: each claim, in each report and, if there are several, in all of them."""
    found = {f"seeds {own[0]} to {own[-1]}": report["claims"] for report in reports for own in [report["seeds"]["DPO"]]}
    if len(reports) > 1:
        found["all"] = claims_of(together(reports))
    return [["the papers' claim", "difference", *found], *(
        [lines[0]["paper"], lines[0]["quantity"], *(
            f"{stats.cell(line['values'], '+.3f')}, {len(line['values'])} seeds: **{line['verdict']}**"
            for line in lines)] for lines in zip(*found.values()))]


def page(reports: list[dict]) -> str:
    """The section of docs/real-models.md that is made from the reports."""
    names = ["opening", "pi_ref", *ARMS]
    answers = [[row[name].translate(IN_CELL).strip() or "…" for name in names] for row in reports[0]["openings"]]
    return "\n".join([
        *(f"- `{report['command']}`: commit {report['commit']}, {report['hardware']}; {report['hours']:.1f} hours of "
          "training, evaluations at the end not counted. PPO's reward models order "
          f"{', '.join(f'{x:.2f}' for x in report['reward_models'])} of the held-out pairs." for report in reports), "",
        "Differences within a seed, with Student's 95 % interval over seeds:", "",
        pages.markdown(differences(reports)), "",
        "Means over all seeds:", "", pages.markdown(table(together(reports))), "",
        "What the first seed's policies answer to the first five held-out openings:", "",
        pages.markdown([names, *answers])])


def draw(evaluations: dict[str, list]):
    """Two panels: win rate against KL, by each judge; a thin line a seed, a thick one their mean."""
    figure, axes = panels(["win rate against pi_ref, first judge", "second judge"],
                          "KL(policy || pi_ref), nats a sequence (square-root scale)", 6.0)
    axes[1].sharey(axes[0])
    for axis, name in zip(axes, ("win_rate", SECOND)):
        for arm, by_seed in evaluations.items():
            for lines in by_seed:
                axis.plot(stats.column(lines, "reverse_kl"), stats.column(lines, name), color=COLOR[arm], lw=0.6,
                          alpha=0.4)
            x, y = ([statistics.fmean(stats.column(list(lines), key)) for lines in zip(*by_seed)]
                    for key in ("reverse_kl", name))
            axis.plot(x, y, color=COLOR[arm], lw=2, marker="o", markersize=3, label=arm)
        axis.axhline(0.5, color="gray", lw=0.8, ls=":")
        axis.set_xscale(**ROOT_SCALE)
        axis.set_xlim(0)
    axes[1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure


def main(options) -> None:
    """The command."""
    make_runs(options)
    report, path = report_of(options), options.results / f"reviews-{options.first_seed}.json"
    run.write_text(path, stats.as_json(report))
    pages.save(draw(together(reports_in(options.results))), options.results / "reviews.png")
    print(aligned(table(report["evaluations"])), "", *(f"- {pages.sentence(line)}" for line in report["claims"]),
          sep="\n")
    print(f"\n{path}, {options.results}/reviews.png")


def reports_in(folder: Path) -> list[dict]:
    """All that there are, by their first seed."""
    return sorted(map(run.read_json, folder.glob("reviews-*.json")), key=lambda report: report["seeds"]["DPO"][0])


def publish(root: Path) -> None:
    """The section of docs/real-models.md between its marks, and the picture, if there is a report."""
    if reports := reports_in(root / "results"):
        pages.between_marks(root / "docs" / "real-models.md", page(reports))
        pages.save(draw(together(reports)), root / "results" / "reviews.png")


def measure(directory: str, openings: int) -> None:
    """again/metrics.jsonl of a finished run: its last policy, on so many held-out openings."""
    start, out = reload(directory, "RUN"), Path(directory)
    args = start.args
    with run.working(args):
        start.policy, start.ref = (data.load_policy(args, path) for path in (str(out / "policy"), start.ref.source))
        start.held_out_prompts = [row["prompt"] for row in run.read_rows(TASK / "held_out_prompts.jsonl")]
        args.eval_samples = openings
        start.samples = data.samples_of(args, start.ref, start.held_out_prompts, start.outcome, start.second, openings)
        run.write_rows(args.out / "metrics.jsonl", [{"step": args.steps, **Evaluator(start, args)(start.policy)}])


if __name__ == "__main__":
    run.start(lambda: measure(sys.argv[1], int(sys.argv[2])))
